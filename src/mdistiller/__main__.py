"""`python -m mdistiller`, which torchrun can start: `torchrun --nproc-per-node 2 -m mdistiller train …`."""

from mdistiller.cli.main import main

if __name__ == "__main__":
    main()
