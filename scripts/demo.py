"""Try a model in the browser: add an image and a text, see the predicted sentiment and which inputs it depends on.

    python scripts/demo.py CHECKPOINT

Needs the extra `demo`. The model runs with this package's code; `--trust_remote_code` runs the checkpoint's own.
"""

import signal
import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from clipcacg.scripts.data.errors import add_debug_flag, one_sentence, parse_flags, set_up_logging
from clipcacg.scripts.reporting.page import build_demo


@dataclass
class DemoArguments:
    """Where the page is served."""

    share: bool = field(default=False, metadata={"help": "Also under a public gradio.live address."})
    port: int | None = field(default=None, metadata={"help": "Port; default: the first free one from 7860 on."})
    min_confidence: float | None = field(
        default=None, metadata={"help": 'Where no label is as likely as this, the answer is "uncertain".'}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that the checkpoint holds."})


def main(argv: list[str] | None = None) -> None:
    set_up_logging()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the cache is deleted at exit, which a signal would skip
    parser = HfArgumentParser(DemoArguments, description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="Folder or Hub name of a trained model.")
    add_debug_flag(parser)
    with one_sentence(argv):
        arguments, rest = parse_flags(parser, argv)
        page = build_demo(rest.checkpoint, arguments.trust_remote_code, arguments.min_confidence)
    page.launch(share=arguments.share, server_port=arguments.port)


if __name__ == "__main__":
    main()
