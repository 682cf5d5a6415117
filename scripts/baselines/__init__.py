"""The other systems of the paper's Table III, built anew, and the floor beneath them; one file a system.

What each departs from stands in its file and in its `substitutions`. `logistic_regression.py` has the two rows that
are no model of ours.
"""

from transformers import AutoConfig, AutoModelForSequenceClassification

from .clmlf import Clmlf
from .cnn_multi import CnnMulti
from .co_memory import CoMemory
from .concatenation import Concatenation
from .dnn_lr import DnnLr
from .itin import Itin
from .mvan import Mvan
from .sentibank_sentistrength import SentiBankSentiStrength

# In the order of Table III; the last is ours.
SYSTEMS = {
    "sentibank_sentistrength": SentiBankSentiStrength,
    "cnn_multi": CnnMulti,
    "dnn_lr": DnnLr,
    "co_memory": CoMemory,
    "mvan": Mvan,
    "clmlf": Clmlf,
    "itin": Itin,
    "concatenation": Concatenation,
}

for system in SYSTEMS.values():
    AutoConfig.register(system.config_class.model_type, system.config_class, exist_ok=True)
    AutoModelForSequenceClassification.register(system.config_class, system, exist_ok=True)

__all__ = ["SYSTEMS"]
