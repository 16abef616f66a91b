"""Parts of the documentation site that are made when it is built.

- Pages in docs/generated/: API reference, command reference, and the pages at the root of the repository.
- Links of Markdown pages that leave docs/. On GitHub they work as they are.
- Equations of docstrings, which are written as in Markdown, in reStructuredText.
"""

import contextlib
import importlib
import io
import os
import posixpath
import re
from pathlib import Path

import published_page

# Pages at the root of the repository, and their names on the site.
ROOT_PAGES = {
    "CHANGELOG.md": "changelog",
    "ARCHITECTURE.md": "architecture",
    "CONTRIBUTING.md": "contributing",
}
# Modules whose public names have a page.
API = {"mdistiller": "python", "mdistiller.functional": "functional"}
# Pages of folders, whose other pages follow them in the navigation.
FOLDER_PAGES = ("methods/README", "results/README", "decisions/README")
# Pages that the search leaves out: history and reasons, which have every word of the manual.
UNSEARCHED = ("generated/changelog", "decisions/")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def version():
    """Returns the package's version without an import of torch."""
    text = (Path(__file__).parents[1] / "src/mdistiller/__init__.py").read_text(
        encoding="utf-8"
    )
    return re.search(r'__version__ = "(.+)"', text)[1]


def connect(app, docs, repository):
    """Connects everything to Sphinx."""

    def write(app):
        write_pages(docs, repository)

    published = published_page.published_sections()

    def read(app, name, source):
        if name.startswith(UNSEARCHED):
            source[0] = f"---\nnosearch: true\n---\n\n{source[0]}"
        folder, _, method = name.rpartition("/")
        if folder == "methods" and method in published:
            source[0] += f"\n{published[method]}"
        if name == "methods/published":
            links = (f"[{method}]({method}.md#published-runs)" for method in published)
            source[0] += f"\n## Tables by method\n\n{', '.join(links)}\n"
        if name in FOLDER_PAGES:
            source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"
        if not name.startswith("generated/"):
            folder = posixpath.join("docs", posixpath.dirname(name))
            source[0] = site_links(source[0], folder, docs, repository)

    def docstring(app, what, name, item, options, lines):
        lines[:] = rst_docstring("\n".join(lines)).split("\n")

    app.connect("builder-inited", write, priority=100)
    app.connect("source-read", read)
    # Before napoleon, which has priority 500.
    app.connect("autodoc-process-docstring", docstring, priority=100)


# Links


def site_links(text, folder, docs, repository):
    """Rewrites the links of a Markdown page that leave docs/.

    A page at the root of the repository becomes its page of the site. Other files and folders become links to
    the repository. Where its address is not known, files are copied into the site, and of a folder only the
    text of the link is left. Code blocks stay as they are.

    Args:
        text: Markdown.
        folder: folder of the page in the repository, such as `docs/methods`.
        docs: path of docs/.
        repository: address of the repository, or None.
    """
    here = folder.rstrip("/")

    def change(match):
        image, label, target = match.groups()
        path, _, anchor = target.partition("#")
        if image or ":" in target or not path:
            return match[0]
        full = posixpath.normpath(posixpath.join(here, path))
        if full in ROOT_PAGES:
            full = f"docs/generated/{ROOT_PAGES[full]}.md"
        elif full in ("README.md", "docs"):
            full = "docs/index.md"
        elif f"{full}/README" in {f"docs/{page}" for page in FOLDER_PAGES}:
            full += "/README.md"
        elif not full.startswith("docs/") or not (docs.parent / full).exists():
            if repository:
                return f"[{label}]({repository}/blob/main/{full})"
            if full.endswith(".md") or not (docs.parent / full).is_file():
                return label  # a file is copied into the site
        base = "docs/generated" if here == "" else here
        found = posixpath.relpath(full, base)
        return f"[{label}]({found}{'#' + anchor if anchor else ''})"

    parts = re.split(r"(^```.*?^```\s*$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else _LINK.sub(change, part) for part in parts
    )


# Generated pages


def write_pages(docs, repository):
    """Writes docs/generated/. A page that has not changed keeps its time, by which Sphinx reads it again."""
    pages = {f"{name}.rst": api_page(module) for module, name in API.items()}
    pages["commands.md"] = commands_page()
    for file, name in ROOT_PAGES.items():
        text = (docs.parent / file).read_text(encoding="utf-8")
        pages[f"{name}.md"] = site_links(text, "", docs, repository)
    folder = docs / "generated"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def api_page(module):
    """Returns the reference of a module's public names."""
    names = importlib.import_module(module).__all__
    title = f"``{module}``"
    parts = [
        title,
        "=" * len(title),
        "",
        f".. automodule:: {module}",
        "   :no-members:",
        "",
    ]
    parts += [".. autosummary::", "", *(f"   {name}" for name in names), ""]
    found = importlib.import_module(module)
    for name in names:
        value = getattr(found, name)
        kind = "autoclass" if isinstance(value, type) else "autofunction"
        parts += [f"``{name}``", "-" * (len(name) + 4), "", f".. {kind}:: {name}", ""]
    return "\n".join(parts)


def commands_page():
    """Returns the reference of the command line, from `--help` of each command."""
    from mdistiller.cli import main

    parts = [
        "# Command reference",
        "Made from `--help` of each command.",
        block(help_of([])),
        "Configs are flags: `mdistiller train RECIPE --help` has those of the recipe's method and models.",
    ]
    for name in main.COMMANDS:
        arguments = [
            name,
            *(["digits.dkd.resnet20_resnet8"] if name == "train" else []),
        ]
        parts += [f"## `mdistiller {' '.join(arguments)}`", block(help_of(arguments))]
    return "\n\n".join(parts) + "\n"


def block(text):
    """Returns a block of text for Markdown."""
    return f"```text\n{text.rstrip()}\n```"


def help_of(arguments):
    """Returns the output of a command with `--help`, 80 columns wide and without colors."""
    from mdistiller.cli.main import run

    before = dict(os.environ)
    os.environ.update(COLUMNS="80", NO_COLOR="1", TERM="dumb")
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            run([*arguments, "--help"])
    finally:
        os.environ.clear()
        os.environ.update(before)
    return re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())


# Docstrings


def rst_docstring(text):
    """Turns the equations of a docstring, `$…$` and `$$…$$`, into those of reStructuredText."""

    def display(match):
        body = match[1].strip()
        indent = re.search(r"([ \t]*)\S*$", text[: match.start()].rsplit("\n", 1)[-1])[
            1
        ]
        lines = "\n".join(f"{indent}   {line.strip()}" for line in body.splitlines())
        return f"\n\n{indent}.. math::\n\n{lines}\n\n{indent}"

    changed = re.sub(r"\$\$(.+?)\$\$", display, text, flags=re.DOTALL)
    inline = r"(?<![\\$\w])\$(?! )([^$\n]+(?:\n[^$\n]+)?)\$"
    return re.sub(inline, lambda m: f":math:`{' '.join(m[1].split())}`", changed)
