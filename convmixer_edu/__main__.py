"`python -m convmixer_edu` is the command `convmixer`."
from .cli import main

if __name__ == "__main__":
    main()
