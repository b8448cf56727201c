"""OpenLM models in this process's transformers: after `register()`, Auto classes load them without remote code."""


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know model type `openlm`: our exports, OpenLM's and DCLM's folders.

    Raises:
        ImportError: transformers is not installed (`pip install openlm-pipeline[hf]`).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from openlm_pipeline.models.hf.configuration_openlm import OpenLMConfig
    from openlm_pipeline.models.hf.modeling_openlm import OpenLMForCausalLM

    AutoConfig.register("openlm", OpenLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(OpenLMConfig, OpenLMForCausalLM, exist_ok=True)
