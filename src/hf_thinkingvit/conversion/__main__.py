"""`python -m hf_thinkingvit.conversion SOURCE OUTPUT_DIR`: the command `hf-thinkingvit convert`."""

from ..commands.convert import main


if __name__ == "__main__":
    main(prog="python -m hf_thinkingvit.conversion")
