"""Score a checkpoint on labelled posts."""

from clipcacg.scripts.training.evaluation import main

if __name__ == "__main__":
    main()
