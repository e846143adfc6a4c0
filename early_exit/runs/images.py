"""How a run's images are made ready, where its settings leave that open.

The one idea: it is settled once, before anything is kept, so that a run's folder says it whole and
no later command asks the weights again.
"""

from early_exit.data.parts import GIVEN
from early_exit.pretrained import preprocessor, sources
from early_exit.runs import checkpoint, layout
from early_exit.settings.read import changed
from early_exit.settings.sections import Settings
from early_exit.storage import buckets

_AS_THEY_ARE = {"mean": (0.0,), "std": (1.0,)}
_LINE, _SIZES = tuple(_AS_THEY_ARE), ("image_size", "resize", "resample")


def settled(config: Settings) -> Settings:
    """The settings; what they leave open is as the weights' `preprocessor_config.json` says.

    A network from a run's folder has what that run had. One that is new, or somebody's own, is
    made for images as they are, from 0 (black) to 1 (white).

    Raises:
      FileNotFoundError, RuntimeError: the source cannot be had.
      ValueError: its folder asks for what is not done.
    """
    data, source = config.data, config.model.source
    wanted = () if data.mean or data.std else _LINE
    wanted += () if data.image_size or data.resize else _SIZES
    if config.model.new or source.startswith(GIVEN):
        said = _AS_THEY_ARE
    elif checkpoint.latest_step(buckets.place(source) / layout.CHECKPOINTS) is not None:
        said = vars(layout.load_config(buckets.place(source)).data)
    else:
        found = preprocessor.read(sources.fetch(source)) if wanted else None
        said = {} if found is None else preprocessor.settings(found)
    return changed(config, {f"data.{name}": said[name] for name in wanted if name in said})
