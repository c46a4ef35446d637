"""`python -m horovod_lm` is `horovod-lm`."""

from horovod_lm.cli import main

if __name__ == "__main__":
    main()
