"""Draw what a model looks at, and what its decision rests on."""

from clipcacg.scripts.reporting.explanation import main

if __name__ == "__main__":
    main()
