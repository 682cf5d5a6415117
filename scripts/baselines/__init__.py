"""The other systems of the paper's Table III, re-implemented, and our concatenation baseline; one file per system.

Each file says what its system departs from, and `substitutions` repeats that for the tables. `logistic_regression.py`
holds the two baselines that are not neural models.
"""

from transformers import AutoConfig, AutoModelForSequenceClassification

from clipcacg.scripts.baselines.clmlf import Clmlf
from clipcacg.scripts.baselines.cnn_multi import CnnMulti
from clipcacg.scripts.baselines.co_memory import CoMemory
from clipcacg.scripts.baselines.concatenation import Concatenation
from clipcacg.scripts.baselines.dnn_lr import DnnLr
from clipcacg.scripts.baselines.itin import Itin
from clipcacg.scripts.baselines.mvan import Mvan
from clipcacg.scripts.baselines.sentibank_sentistrength import SentiBankSentiStrength

# In the order of Table III; the last one is ours.
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
