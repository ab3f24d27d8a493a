"""ms-swift: `MASHUP_CANDIDATES='["runs/*"]' swift sft --external_plugins ms_swift.py --callbacks mashup ...`."""

import json
import os

from swift.callbacks.mapping import callbacks_map

from mashup_callback import MashupCallback


class SwiftMashupCallback(MashupCallback):
    """Made by ms-swift with its arguments and its trainer, and bound to it."""

    def __init__(self, args, trainer):
        super().__init__(json.loads(os.environ["MASHUP_CANDIDATES"]))
        self.bind(trainer)


callbacks_map["mashup"] = SwiftMashupCallback
