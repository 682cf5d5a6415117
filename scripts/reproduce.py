"""Train what the paper's Tables III and IV compare, under one protocol, and make the tables."""

from clipcacg.scripts.tables.runs import main

if __name__ == "__main__":
    main()
