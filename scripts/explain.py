"""Draw what a model attends to, and which inputs its decision depends on.

    python scripts/explain.py CHECKPOINT --image photo.jpg --text "What a lovely morning!" -o explanation.png

Needs the extra `explain`. The model runs with this package's code; `--trust_remote_code` runs the checkpoint's own.
"""

import argparse

import torch

from clipcacg.scripts.data.errors import add_debug_flag, as_input_error, one_sentence, set_up_logging
from clipcacg.scripts.reporting.explanation import draw, explain, summary
from clipcacg.scripts.reporting.predictions import load_checkpoint


def main(argv: list[str] | None = None) -> None:
    set_up_logging()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="Folder or Hub name of a trained model.")
    parser.add_argument("--image", help="Path or URL of the image.")
    parser.add_argument("--text", help="The text.")
    parser.add_argument("-o", "--output", default="explanation.png", help="Image file to write.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run the code that the checkpoint holds.")
    add_debug_flag(parser)
    arguments = parser.parse_args(argv)
    with one_sentence(argv):
        model, processor = load_checkpoint(arguments.checkpoint, arguments.trust_remote_code, dtype=torch.float32)
        explanation = explain(model.requires_grad_(False), processor, arguments.image, arguments.text)
        figure = draw(explanation)
        with as_input_error(f"--output {arguments.output} cannot be written", OSError, ValueError):
            figure.savefig(arguments.output)
        print(summary(explanation))
        print(f"The image is in {arguments.output}.")


if __name__ == "__main__":
    main()
