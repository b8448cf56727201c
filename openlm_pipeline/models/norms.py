"""The norms that OpenLM's `--model-norm` names, over the last axis."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openlm_pipeline.models.config import ModelConfig


class LowPrecisionLayerNorm(nn.LayerNorm):
    """LayerNorm that stays in autocast's type instead of fp32; the same as LayerNorm where there is no autocast."""

    def forward(self, x: Tensor) -> Tensor:
        device_type = x.device.type
        if not torch.is_autocast_enabled(device_type):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device_type)
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm that `config.norm` names, over the last axis."""
    eps = config.norm_eps
    match config.norm:
        case "default_layer_norm":
            return nn.LayerNorm(width, eps)
        case "lp_layer_norm":
            return LowPrecisionLayerNorm(width, eps)
        case "gain_only_layer_norm":
            return nn.LayerNorm(width, eps, bias=False)
        case "gain_only_lp_layer_norm":
            return LowPrecisionLayerNorm(width, eps, bias=False)
        case "no_wb_layer_norm":
            return nn.LayerNorm(width, eps, elementwise_affine=False)
        case "rms_norm":
            return nn.RMSNorm(width, eps)
    raise AssertionError(config.norm)
