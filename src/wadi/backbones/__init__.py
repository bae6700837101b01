"""Model families, one file each, behind one contract (`wadi.backbones.base.Backbone`)."""

from wadi.backbones.base import Backbone, Condition
from wadi.backbones.loading import family, from_pipeline, load_pipeline, register_family
from wadi.diffusion.schedulers import refuse_distilled

__all__ = ["Backbone", "Condition", "family", "from_pipeline", "load_pipeline", "refuse_distilled", "register_family"]
