"""
Layers that run on their leading channels: the input's width decides which slice of the weights is used.

Slices are views: no weight is copied. At full width the layers are exactly `nn.Linear` and `nn.LayerNorm`.
"""

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.activations import ACT2FN, GELUActivation

from .module_caches import ModuleCacheMixin, is_plain_tensor
from .module_quantization import RefusesTorchQuantization
from .module_recording import is_idle_recorder
from .nested_projection import LeadingCorner, project


class LeadingSliceMixin(RefusesTorchQuantization, ModuleCacheMixin):
    """
    Provides `leading(...)`, views of the leading channels of weight and bias. Inference caches the views: taking them
    again costs more, at batch 1 on a CPU, than some of the products that use them.

    A cached view shares the storage of its parameter, so it needs no update when values change, in place or through
    `.data`, or when the storage itself is resized. It is dropped when storage, offset, shape, strides or dtype change,
    by assigning another parameter or by `p.data = ...`. Only views of plain parameters are cached, and only without
    gradients: a view taken under `torch.no_grad()` would cut the graph.
    """

    _cache_attributes = ("_cached_views",)

    def leading(self, *sizes: int) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """
        Views of `weight[:sizes[0], :sizes[1], ...]` and `bias[:sizes[0]]`. `None` for a quantised weight without such a
        slice: call `product_at_full_width`.
        """
        weight, bias = self.weight, self.bias
        if sizes == weight.shape:
            return weight, bias
        if torch.compiler.is_compiling():
            return self._corner_if_any(weight, bias, sizes)
        if torch.is_grad_enabled() or not self._may_cache(weight, bias):
            self._drop_views()
            return self._corner_if_any(weight, bias, sizes)
        cached = self.__dict__.get("_cached_views")
        if cached is None or not (_is_same_memory(weight, cached[0]) and _is_same_memory(bias, cached[1])):
            cached = weight.detach(), None if bias is None else bias.detach(), {}
            self.__dict__["_cached_views"] = cached
        views = cached[2].get(sizes)
        if views is None:
            views = self._corner(weight, bias, sizes)
            if all(view is None or is_plain_tensor(view) for view in tree_leaves(views)):
                cached[2][sizes] = views
        return views

    def _may_cache(self, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        # Sharded, quantised and parametrized weights are not plain parameters. Accelerate (`_hf_hook`) may load
        # offloaded weights for each call.
        plain = type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
        return plain and "_hf_hook" not in self.__dict__

    def _drop_views(self) -> None:
        self.__dict__.pop("_cached_views", None)

    def _corner_if_any(
        self, weight: torch.Tensor, bias: torch.Tensor | None, sizes: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        if type(weight) in (nn.Parameter, torch.Tensor):
            return self._corner(weight, bias, sizes)
        try:
            return self._corner(weight, bias, sizes)
        except (AssertionError, NotImplementedError, RuntimeError, ValueError):
            # torchao cuts some layouts between blocks of equal scale only, and others not at all.
            return None

    def _corner(
        self, weight: torch.Tensor, bias: torch.Tensor | None, sizes: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        corner = tuple(slice(size) for size in sizes)
        return weight[corner], None if bias is None else bias[corner[0]]

    # Not needed for correctness, but cached views would hold the memory of the old weights until the next call.
    def _apply(self, *args, **kwargs):
        self._drop_views()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._drop_views()
        return super()._load_from_state_dict(*args, **kwargs)


def _is_same_memory(tensor: torch.Tensor | None, alias: torch.Tensor | None) -> bool:
    """Whether `tensor` still has the storage, offset, shape, strides and dtype of `alias`, taken from it earlier."""
    if tensor is None or alias is None:
        return tensor is alias
    try:
        return tensor.dtype == alias.dtype and tensor.is_set_to(alias)
    except NotImplementedError:  # devices without memory (meta) or without this operation
        return False


def product_at_full_width(
    layer: nn.Linear, hidden_states: torch.Tensor, out_features: int, row_blocks: int = 1
) -> torch.Tensor:
    """What `project` promises, by the whole weight: zeros stand for the channels that `hidden_states` does not have."""
    corner = LeadingCorner(hidden_states.shape[-1], out_features, row_blocks)
    hidden_states = nn.functional.pad(hidden_states, (0, layer.in_features - corner.in_features))
    return corner.cut(nn.functional.linear(hidden_states, layer.weight, layer.bias))


class NestedLinear(LeadingSliceMixin, nn.Linear):
    """
    A linear map whose leading rows and columns are a smaller linear map.

    Call it by `project`, which also serves modules that take its place.
    """

    def forward(self, hidden_states: torch.Tensor, out_features: int | LeadingCorner | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(..., width)`): uses the first `width` columns of the weight.
            out_features (`int`, *optional*): uses the first `out_features` rows; all by default. A [`LeadingCorner`]
                comes from an adapter around this layer.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`.
        """
        if isinstance(out_features, LeadingCorner):
            corner = out_features
            output = NestedLinear.forward(self, hidden_states[..., : corner.in_features], corner.out_features)
            return corner.widen(output, self.out_features)
        if out_features is not None and out_features > self.out_features:
            raise ValueError(f"{out_features} leading rows were asked of a layer that has {self.out_features}.")
        out_features = out_features or self.out_features
        views = self.leading(out_features, hidden_states.shape[-1])
        if views is None:
            return product_at_full_width(self, hidden_states, out_features)
        return nn.functional.linear(hidden_states, *views)


class NestedConv2d(LeadingSliceMixin, nn.Conv2d):
    """
    A patch embedding (a convolution with stride = kernel size) of which any range of channels can be computed.

    Call it by `project_patches`, which also serves modules that take its place.
    """

    def forward(self, pixel_values: torch.Tensor, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """
        `pixel_values` (batch, channels, height, width) → patches (batch, number of patches, stop - start). Without
        `start`, as an adapter calls it, what a convolution gives: (batch, out_channels, rows, columns).
        """
        if start is None:
            return super().forward(pixel_values)
        if start == 0:
            weight, bias = self.leading(stop or self.out_channels, *self.weight.shape[1:])
            return self._conv_forward(pixel_values, weight, bias).flatten(2).transpose(1, 2)
        # Later channels are computed only for the images that go on. A product with their patches gives the same,
        # and is faster for few images than a convolution.
        rows, columns = (side // patch for side, patch in zip(pixel_values.shape[2:], self.kernel_size))
        patches = pixel_values[..., : rows * self.kernel_size[0], : columns * self.kernel_size[1]]
        patches = patches.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
        weight, bias = self.weight[start:stop].flatten(1), self.bias[start:stop]
        return nn.functional.linear(patches.flatten(3).flatten(1, 2), weight, bias)


class NestedLayerNorm(LeadingSliceMixin, nn.LayerNorm):
    """LayerNorm over inputs `(..., width)`, with the first `width` weights and biases."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        width = hidden_states.shape[-1]
        weight, bias = self.leading(width)
        return torch.layer_norm(hidden_states, (width,), weight, bias, self.eps)


# Private in torch. If it is missing, hooks are assumed.
_has_any_global_hook = getattr(nn.modules.module, "_has_any_global_hook", None)

# Classes that return newly allocated memory, or the output of an earlier module of these classes, so that inference may
# overwrite it. Subclasses, such as the layers of PEFT, do not count: they may return anything, for example their input.
_OWN_OUTPUT: set[type[nn.Module]] = {GELUActivation, NestedLinear}


def owns_output(module_class: type[nn.Module]) -> type[nn.Module]:
    """Class decorator that adds `module_class` to `_OWN_OUTPUT`."""
    _OWN_OUTPUT.add(module_class)
    return module_class


def may_overwrite(output: torch.Tensor, *modules: nn.Module) -> bool:
    """
    Whether inference may overwrite `output`, which the first of `modules` has just returned and the others have passed
    on. Allocating memory takes about a tenth of a layer's time on a CPU. `False` if a gradient may need `output`, if a
    hook may have stored it, or if one of `modules` has been replaced and may return a tensor that others hold.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(output) is not torch.Tensor:
        return False
    if _has_any_global_hook is None or _has_any_global_hook():
        return False
    for module in modules:  # noqa: SIM110, called thrice by every layer
        if not _is_unobserved(module):
            return False
    return True


def _is_unobserved(module: nn.Module) -> bool:
    """Whether the class of `module` is in `_OWN_OUTPUT`, and no hook sees its input or output."""
    attributes = module.__dict__
    if type(module) not in _OWN_OUTPUT or "forward" in attributes or attributes["_forward_pre_hooks"]:
        return False
    if attributes.get("_compiled_call_impl") is not None:
        return False
    hooks = attributes["_forward_hooks"]
    return not hooks or all(map(is_idle_recorder, hooks.values()))


def add_residual(hidden_states: torch.Tensor, branch: torch.Tensor, *modules: nn.Module) -> torch.Tensor:
    """`hidden_states + branch`, where the first of `modules` has just returned `branch` and the others passed it on."""
    # Under autocast, the sum has the wider dtype.
    if branch.dtype == hidden_states.dtype and may_overwrite(branch, *modules):
        return branch.add_(hidden_states)
    return hidden_states + branch


@owns_output
class NestedMLP(nn.Module):
    """Two linear maps with an activation between them, on their leading channels."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.activation_fn = ACT2FN[hidden_act]
        self.fc1 = NestedLinear(hidden_size, intermediate_size)
        self.fc2 = NestedLinear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, intermediate_size: int) -> torch.Tensor:
        """`hidden_states` (..., width) → the same shape, through the first `intermediate_size` MLP channels."""
        intermediate = project(self.fc1, hidden_states, intermediate_size)
        if _is_exact_gelu(self.activation_fn) and may_overwrite(intermediate, self.fc1, self.activation_fn):
            torch.ops.aten.gelu_(intermediate)
        else:
            intermediate = self.activation_fn(intermediate)
        return project(self.fc2, intermediate, hidden_states.shape[-1])


def _is_exact_gelu(activation_fn: nn.Module) -> bool:
    """Checked in every call, because users may replace the activation."""
    return type(activation_fn) is GELUActivation and activation_fn.act is nn.functional.gelu


@owns_output
class ResidualDropout(nn.Module):
    """
    In training, drops single values of a residual branch (dropout) and the whole branch of an image (stochastic depth,
    arXiv 1603.09382), and rescales the rest. In evaluation, the identity.
    """

    def __init__(self, dropout_prob: float = 0.0, drop_path_rate: float = 0.0):
        super().__init__()
        self.dropout_prob = dropout_prob
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` of shape `(batch, ...)`; stochastic depth draws once per image, not per token."""
        if not self.training:
            return hidden_states
        hidden_states = nn.functional.dropout(hidden_states, self.dropout_prob)
        if self.drop_path_rate == 0.0:
            return hidden_states
        image_shape = (hidden_states.shape[0],) + (1,) * (hidden_states.dim() - 1)
        return hidden_states * nn.functional.dropout(hidden_states.new_ones(image_shape), self.drop_path_rate)

    def extra_repr(self) -> str:
        return f"dropout_prob={self.dropout_prob}, drop_path_rate={self.drop_path_rate:.4g}"
