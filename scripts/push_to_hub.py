"""Push a checkpoint to the Hub: whole, and with nothing else."""

from clipcacg.scripts.reporting.hub import main

if __name__ == "__main__":
    main()
