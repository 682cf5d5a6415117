"""Train CLIP-CA-CG, test it, and leave a checkpoint that loads anywhere."""

from clipcacg.scripts.training.run import main

if __name__ == "__main__":
    main()
