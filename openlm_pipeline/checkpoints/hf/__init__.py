"""OpenLM models in transformers: the two files that exported folders carry along, and what `save_pretrained` makes of
them too, and `register()`, after which Auto classes load our exports, OpenLM's and DCLM's folders without remote code.
"""


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know model type `openlm`: our exports, OpenLM's and DCLM's folders.

    Raises:
        ImportError: transformers is not installed (`pip install openlm-pipeline[hf]`).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from openlm_pipeline.checkpoints.hf.configuration_openlm import OpenLMConfig
    from openlm_pipeline.checkpoints.hf.modeling_openlm import OpenLMForCausalLM

    AutoConfig.register("openlm", OpenLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(OpenLMConfig, OpenLMForCausalLM, exist_ok=True)
