"""Try a model in the browser: drop a picture, type a text, see what the model says and what it looks at."""

from clipcacg.scripts.reporting.page import main

if __name__ == "__main__":
    main()
