"""`python -m hybridlm`: the command line."""

from hybridlm.cli import main

if __name__ == "__main__":
    main()
