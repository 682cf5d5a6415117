"""Predict the sentiment of posts."""

from clipcacg.scripts.reporting.predictions import main

if __name__ == "__main__":
    main()
