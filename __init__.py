"""CLIP-CA-CG: image-text sentiment analysis for the Hugging Face ecosystem.

Importing the package registers the model with transformers' Auto classes. A checkpoint's own copy of the code never
registers itself: a second checkpoint, with other code, would then run the first one's classes.
"""

from importlib.metadata import PackageNotFoundError, version

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_clipcacg import CUSTOM_PIPELINES, ClipCaCgConfig
from .modeling_clipcacg import ClipCaCgForSequenceClassification, ClipCaCgModel, ClipCaCgPreTrainedModel
from .pipeline_clipcacg import ImageTextSentimentPipeline
from .processing_clipcacg import ClipCaCgProcessor

try:
    __version__ = version("clipcacg")
except PackageNotFoundError:  # a Space has the package's files beside its app.py, without an installation
    __version__ = "unknown"

if __name__ == "clipcacg":  # pytest also imports a checkout, as a package with the name of its folder
    AutoConfig.register(ClipCaCgConfig.model_type, ClipCaCgConfig)
    AutoModel.register(ClipCaCgConfig, ClipCaCgModel)
    AutoModelForSequenceClassification.register(ClipCaCgConfig, ClipCaCgForSequenceClassification)
    AutoProcessor.register(ClipCaCgConfig, ClipCaCgProcessor)
    for task in CUSTOM_PIPELINES:
        PIPELINE_REGISTRY.register_pipeline(task, ImageTextSentimentPipeline, AutoModelForSequenceClassification)

__all__ = [
    "ClipCaCgConfig",
    "ClipCaCgForSequenceClassification",
    "ClipCaCgModel",
    "ClipCaCgPreTrainedModel",
    "ClipCaCgProcessor",
    "ImageTextSentimentPipeline",
]
