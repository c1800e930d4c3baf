"""Ensembles for transformers: causal LMs whose next-token distribution a rule computes from their members'."""

from transformers import AutoConfig, AutoModelForCausalLM

from softmeet.engine.recorder import Recorder
from softmeet.hf.byte_modeling import ByteEnsembleForCausalLM
from softmeet.hf.cache import EnsembleCache
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.report import TokenReport, TokenReports
from softmeet.hf.union_modeling import UnionEnsembleForCausalLM

__all__ = ["EnsembleCache", "EnsembleConfig", "EnsembleForCausalLM", "Recorder", "TokenReport", "TokenReports"]

AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig, exist_ok=True)
# The configuration's architecture chooses between them, and pipelines look for a model's own class among them.
_KINDS = (EnsembleForCausalLM, ByteEnsembleForCausalLM, UnionEnsembleForCausalLM)
AutoModelForCausalLM.register(EnsembleConfig, _KINDS, exist_ok=True)
