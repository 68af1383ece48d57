"""What the code leans on inside transformers, accelerate and torch, beyond what they promise.

Each test is one such thing, its docstring the place that leans on it and why. A new release that
changes it turns a line red here, before it becomes a silent error there.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import vlprune
from vlprune.folders import save
from vlprune.folders.exported import runtimes
from vlprune.testing import build

SOURCE = Path(vlprune.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}

# -- nothing is left out ---------------------------------------------------------------


def imported_from_inside() -> list[str]:
    """``module:name`` of every import from a submodule of theirs, wherever it stands in src."""
    names = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                package, _, rest = node.module.partition(".")
                if package in ("torch", "transformers", "accelerate") and rest:
                    names |= {f"{node.module}:{alias.name}" for alias in node.names}
    return sorted(names)


@pytest.mark.parametrize("name", imported_from_inside())
def test_what_is_imported_from_inside_is_there(name: str) -> None:
    """src, everywhere: imports inside functions would fail only when they are reached."""
    module, _, name = name.partition(":")
    assert hasattr(importlib.import_module(module), name)


def test_every_private_attribute_is_stated_here() -> None:
    """src, everywhere: no underscore of theirs may be used without a test below."""
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    private = [n for n in nodes if isinstance(n, ast.Attribute) and re.match(r"_[a-z]", n.attr)]
    of_self = [
        n for n in private if isinstance(n.value, ast.Name) and n.value.id in ("self", "cls")
    ]
    ours = {"_follow", "_exit"} | {n.attr for n in of_self if isinstance(n.ctx, ast.Store)}
    ours |= {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    used = {n.attr for n in private if n not in of_self and not n.attr.startswith("_vlprune")}
    stated = Path(__file__).read_text()
    assert not {name for name in used - ours if not re.search(rf"\b{name}\b", stated)}


# -- torch: loaders ------------------------------------------------------------------------


def test_the_workers_of_a_loader_can_be_ended() -> None:
    """fit: an error's traceback would keep them."""
    loader = torch.utils.data.DataLoader([1, 2], num_workers=1, persistent_workers=True)
    next(iter(loader))
    iterator = loader._iterator
    assert iterator is not None
    iterator._shutdown_workers()  # type: ignore[attr-defined]
    assert not any(worker.is_alive() for worker in iterator._workers)  # type: ignore[attr-defined]


# -- transformers: folders -------------------------------------------------------------


def test_the_registry_of_quantizers() -> None:
    """hook: shapes are rebuilt by a quantizer, registered under our name."""
    auto = importlib.import_module("transformers.quantizers.auto")
    assert "vlprune" in auto.AUTO_QUANTIZER_MAPPING
    assert "vlprune" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert callable(auto.register_quantizer)
    assert callable(auto.register_quantization_config)


def test_a_quantizer_is_called_around_the_loading_of_weights() -> None:
    """hook: before it we cut the empty model, after it we take the flags away."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    calls = []

    class Probe(HfQuantizer):
        requires_calibration = False
        is_trainable = True

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> None:
            calls.append("before")

        def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
            calls.append("after")
            return model

    model = build("vit").model
    probe = Probe(QuantizationConfigMixin("vlprune"), pre_quantized=False)
    probe.preprocess_model(model)
    assert calls == ["before"]
    assert model.is_quantized
    assert model.quantization_method == "vlprune"
    assert probe.postprocess_model(model) is model
    assert calls == ["before", "after"]
    assert model.config._is_quantized  # set before we are called, so that we can unset it


@pytest.mark.parametrize(
    "name", ["is_serializable", "is_trainable", "is_qat_trainable", "is_compileable"]
)
def test_what_a_quantizer_is_asked(name: str) -> None:
    """hook: our answers let the small model save, train and compile."""
    from transformers.quantizers.base import HfQuantizer

    assert hasattr(HfQuantizer, name)


def test_the_flag_hf_quantizer_is_what_saving_and_half_look_at() -> None:
    """hook: deleting the attribute makes the model an ordinary one again."""
    for method in (transformers.PreTrainedModel.save_pretrained, transformers.PreTrainedModel.half):
        assert re.search(r"hf_quantizer|is_quantized", inspect.getsource(method))


def test_the_config_goes_on_holding_quantization_config() -> None:
    """record: the plan is kept in the config under this key, as an object that has to_dict."""
    config = transformers.ViTConfig(quantization_config={"quant_method": "vlprune"})
    assert config.to_dict()["quantization_config"] == {"quant_method": "vlprune"}


def test_a_config_names_its_sub_configs() -> None:
    """record, stock: each sub-config gets its own part of the plan."""
    assert set(transformers.CLIPConfig.sub_configs) == {"text_config", "vision_config"}


def test_a_stand_in_can_be_registered_as_a_config() -> None:
    """hook: AutoConfig takes anything, so our config classes are imported late."""
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    mapping, stand_in = type(auto.CONFIG_MAPPING)({"bert": "BertConfig"}), object()
    mapping.register("vlprune_new", stand_in, exist_ok=True)
    assert mapping["vlprune_new"] is stand_in
    assert "bert" in mapping  # a type of theirs is known, so that we leave it to them
    assert "glip" not in mapping


def test_a_stand_in_can_be_registered_as_a_model() -> None:
    """models.configs: AutoModel finds our model classes by the config class itself."""
    from vlprune.models import MdetrConfig

    assert MdetrConfig in transformers.AutoModel._model_mapping
    assert transformers.AutoModel._model_mapping[MdetrConfig].config_class is MdetrConfig


def test_a_model_type_given_as_keyword_hides_the_classs() -> None:
    """models.configs: which is why ours drop it, when they read a folder from before."""
    assert transformers.ViTConfig.from_dict({"model_type": "former"}).model_type == "former"


def test_a_config_is_read_as_a_dictionary_first(tmp_path: Path) -> None:
    """checkpoint, models.configs: get_config_dict gives the dictionary and unused keywords."""
    (tmp_path / "config.json").write_text('{"model_type": "former"}')
    config, _ = transformers.PreTrainedConfig.get_config_dict(tmp_path)
    assert config["model_type"] == "former"


def test_models_know_their_prefix_and_main_input() -> None:
    """checkpoint, matching: names of a base model and of a head differ by the prefix."""
    assert transformers.ViTForImageClassification.base_model_prefix == "vit"
    assert transformers.ViTModel.main_input_name == "pixel_values"


def test_models_initialise_through_init_weights() -> None:
    """models: ours override _init_weights, which post_init calls for modules with weights."""
    calls = []

    class Probe(transformers.ViTModel):
        def _init_weights(self, module: Any) -> None:
            calls.append(type(module).__name__)
            super()._init_weights(module)

    Probe(build("vit").model.config)
    assert {"Linear", "ViTEmbeddings"} <= set(calls)


# -- transformers: attention -----------------------------------------------------------


def test_attention_is_looked_up_by_name_with_a_default() -> None:
    """forwards: our fused BLIP attention asks with get_interface and falls back on its own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def own() -> None: ...

    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", own) is own
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", own) is not own


def test_attention_modules_see_the_implementation_in_their_config() -> None:
    """forwards: config._attn_implementation is what set_attn_implementation was told."""
    model: Any = build("vit").model
    attention = next(m for m in model.modules() if type(m).__name__ == "ViTAttention")
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert attention.config._attn_implementation == name


def test_attention_maps_are_collected_by_hooks_that_stay() -> None:
    """forwards: _watched tells their hooks by the module, and asks what is collected now."""
    from transformers.utils import output_capturing

    sample = build("vit")
    model: Any = sample.model
    model.set_attn_implementation("eager")
    during: list[Any] = []

    def look(*_: Any) -> None:
        during.append(dict(output_capturing._active_collector.get() or {}))

    attention = next(m for m in model.modules() if type(m).__name__ == "ViTAttention")
    attention.register_forward_pre_hook(look)
    assert model(**sample.inputs, output_attentions=True).attentions[0] is not None
    assert any("attentions" in name for name in during[-1])
    model(**sample.inputs)
    assert not any("attentions" in name for name in during[-1])
    hooks = [h for m in model.modules() for h in m._forward_hooks.values()]
    assert hooks
    assert all(h.__module__ == output_capturing.__name__ for h in hooks)


def test_a_cache_for_decoders_that_read_an_encoder() -> None:
    """forwards: CutBlipTextSelfAttention reads and writes it as BLIP's own attention does."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert not cache.is_updated.get(0)
    states = torch.ones(1, 2, 3, 4)
    keys, _ = cache.cross_attention_cache.update(states, states, 0)
    assert keys.shape == states.shape
    assert torch.equal(cache.cross_attention_cache.layers[0].keys, states)
    assert torch.equal(cache.cross_attention_cache.layers[0].values, states)
    assert hasattr(cache, "self_attention_cache")


@torch.no_grad()
def test_blips_decoder_reads_the_padding_of_a_question() -> None:
    """recipes/upop/vqav2.yaml: the mask of the states never reaches cross-attention."""
    sample = build("blip_vqa")
    decoder: Any = sample.model.text_decoder.eval()
    states = torch.randn(1, 5, decoder.config.encoder_hidden_size)
    ids, mask = sample.inputs["input_ids"][:1], torch.tensor([[1, 1, 1, 0, 0]])
    padded = decoder(ids, encoder_hidden_states=states, encoder_attention_mask=mask).logits
    bare = decoder(ids, encoder_hidden_states=states).logits
    assert torch.equal(padded, bare)
    short = decoder(ids, encoder_hidden_states=states[:, :3]).logits
    assert not torch.allclose(padded, short)


def test_the_loss_of_blips_decoder_per_row_and_its_smoothing() -> None:
    """decoder_loss: ``reduction="none"`` sums a row's tokens, by what ``label_smoothing`` says."""
    sample = build("blip_vqa")
    decoder: Any = sample.model.text_decoder.eval()
    decoder.label_smoothing = 0.1
    ids = sample.inputs["input_ids"]
    states = torch.randn(len(ids), 5, decoder.config.encoder_hidden_size)
    found = decoder(ids, encoder_hidden_states=states, labels=ids, reduction="none")
    each = nn.functional.cross_entropy(
        found.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none", label_smoothing=0.1
    )
    torch.testing.assert_close(found.loss, each.sum(1))


@pytest.mark.parametrize(
    ("family", "name", "attributes"),
    [
        ("blip", "BlipAttention", "num_heads head_dim scale qkv projection config"),
        ("blip2", "Blip2Attention", "num_heads head_dim scale qkv projection config"),
        ("instructblip", "InstructBlipAttention", "num_heads head_dim scale qkv projection config"),
        (
            "blip_captioning",
            "BlipTextSelfAttention",
            "attention_head_size query key value dropout layer_idx",
        ),
        ("vilt", "ViltSelfAttention", "attention_head_size query key value dropout"),
        ("flava", "FlavaSelfAttention", "attention_head_size query key value dropout"),
    ],
)
def test_what_our_forwards_read_of_the_class_they_replace(
    family: str, name: str, attributes: str
) -> None:
    """forwards: our subclasses take over modules that the stock class has built, and its calls."""
    from vlprune.architectures import forwards

    module: Any = next(m for m in build(family).model.modules() if type(m).__name__ == name)
    assert all(hasattr(module, attribute) for attribute in attributes.split())
    if "qkv" in attributes:
        assert isinstance(module.config._attn_implementation, str)
        assert hasattr(module, "attention_dropout") or hasattr(module.dropout, "p")
    stock = inspect.signature(type(module).forward).parameters
    own = inspect.signature(getattr(forwards, f"Cut{name}").forward).parameters
    named = {n for n, p in stock.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
    assert named <= own.keys() or takes_any


def test_conv1d_stores_its_weight_transposed() -> None:
    """layers, cutting: GPT-2's Conv1D is (in, out), and says its widths as nx and nf."""
    layer = transformers.pytorch_utils.Conv1D(5, 3)  # (out, in)
    assert layer.weight.shape == (3, 5)
    assert (layer.nf, layer.nx) == (5, 3)


# -- transformers: the Trainer ---------------------------------------------------------


@pytest.fixture
def trainer(tmp_path: Path) -> transformers.Trainer:
    from vlprune.training.objective import Trainee

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True
    )
    return transformers.Trainer(model=Trainee(nn.Linear(2, 2)), args=arguments)


def test_callbacks_are_a_list_that_is_called_in_order(trainer: transformers.Trainer) -> None:
    """compressor, train: ours is put in front, so that loggers see what it adds to a log."""
    calls = []

    class Note(transformers.TrainerCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            calls.append(self.name)
            assert state.log_history[-1] is not logs  # a copy, made before: we add to both
            assert state.log_history[-1]["loss"] == logs["loss"]

    trainer.add_callback(Note("second"))
    trainer.callback_handler.callbacks.insert(0, Note("first"))
    trainer.log({"loss": 1.0})
    assert calls == ["first", "second"]


def test_a_callback_with_a_state_is_saved_under_the_name_of_its_class() -> None:
    """compressor: the search is read back from stateful_callbacks of trainer_state.json."""
    from transformers.trainer_callback import ExportableState

    class Keeps(transformers.TrainerCallback, ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"search": "text"}}

    state = transformers.TrainerState(stateful_callbacks=[Keeps()])
    assert state.stateful_callbacks == {"Keeps": Keeps().state()}
    assert "on_pre_optimizer_step" in dir(transformers.TrainerCallback)


def test_names_of_files_and_folders_of_a_checkpoint() -> None:
    """train: a finished training is found by them, and its weights loaded from there."""
    from transformers import trainer, trainer_utils

    assert trainer_utils.PREFIX_CHECKPOINT_DIR == "checkpoint"
    assert trainer.TRAINER_STATE_NAME == "trainer_state.json"
    assert (
        "resume_from_checkpoint"
        in inspect.signature(transformers.Trainer._load_from_checkpoint).parameters
    )


def test_the_trainer_saves_in_one_method_and_unpickles_no_code() -> None:
    """train: a checkpoint is sealed after it; checkpoints: a stranger's pickle must not run."""
    saving = inspect.signature(transformers.Trainer._save_checkpoint)
    assert list(saving.parameters) == ["self", "model", "trial"]
    source = inspect.getsource(transformers.trainer)
    loads = re.findall(r"torch\.load\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", source)
    assert len(loads) == source.count("torch.load(") > 5
    assert all("weights_only=True" in load for load in loads)


def test_what_the_trainer_asks_of_a_bare_module(trainer: transformers.Trainer) -> None:
    """trainee: the Trainer reads both attributes off the model it is given."""
    load = inspect.getsource(transformers.Trainer._issue_warnings_after_load)
    assert "self.model._keys_to_ignore_on_save" in load
    assert trainer.model_accepts_loss_kwargs is False  # from Trainee.accepts_loss_kwargs


def test_the_optimizer_of_a_callback_carries_the_scaler() -> None:
    """compressor: under fp16 the gates' gradients are unscaled by it."""
    from accelerate.optimizer import AcceleratedOptimizer

    assert "scaler" in inspect.signature(AcceleratedOptimizer.__init__).parameters
    assert "self.scaler = scaler" in inspect.getsource(AcceleratedOptimizer.__init__)


def test_tensorboards_folder_is_read_from_the_environment() -> None:
    """train: TENSORBOARD_LOGGING_DIR says where the logs go."""
    from transformers.integrations import TensorBoardCallback

    assert "TENSORBOARD_LOGGING_DIR" in inspect.getsource(TensorBoardCallback.__init__)


def test_accelerates_state_is_empty_before_a_trainer_is_made() -> None:
    """models.mdetr, models.glip: PartialState._shared_state tells whether to reduce a count."""
    from accelerate import PartialState

    assert isinstance(PartialState._shared_state, dict) or not PartialState._shared_state
    PartialState()
    assert PartialState._shared_state


# -- transformers: exporters -----------------------------------------------------------


def test_the_exporters_are_called_what_we_call_them() -> None:
    """export: they are asked for by name, and loading them all here would take long."""

    exporters = pytest.importorskip("transformers.exporters")
    names = {name for *pair, _ in runtimes.EXPORTERS.values() for name in pair}
    names |= {name for name, _ in runtimes.QUANTIZERS.values()} | {"OnnxRuntimeDynamicConfig"}
    assert names <= set(dir(exporters))
    base = importlib.import_module("transformers.exporters.base")
    assert hasattr(base.ExportedModel, "from_pretrained")
    assert save.MANIFEST in inspect.getsource(base)
    assert "export_format" in inspect.getsource(base)


def test_a_generation_is_taken_apart_into_stages() -> None:
    """export: {stage: (module, inputs)}, by which every stage of an export is checked."""
    utils = pytest.importorskip("transformers.exporters.utils")
    assert [*inspect.signature(utils.decompose_for_generation).parameters][:2] == [
        "model",
        "inputs",
    ]


# -- torch: modules --------------------------------------------------------------------


def test_parameters_and_modules_are_plain_dictionaries() -> None:
    """cutting, share, matching: _parameters and _modules are written to and read directly."""
    layer = nn.Sequential(nn.Linear(2, 2))
    layer[0]._parameters["weight"] = nn.Parameter(torch.ones(1, 2))
    assert layer[0].weight.shape == (1, 2)
    layer._modules["0"] = nn.Identity()
    assert isinstance(layer[0], nn.Identity)


def test_an_entry_in_dict_shadows_a_parameter() -> None:
    """gate: an nn.MultiheadAttention reads the gated product in place of the parameter."""
    layer = nn.Linear(2, 2)
    layer.__dict__["weight"] = torch.zeros(2, 2)
    assert not layer.weight.any()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    del layer.__dict__["weight"]
    assert isinstance(layer.weight, nn.Parameter)


def test_a_forward_in_dict_is_the_one_that_is_called() -> None:
    """gate: a gated Linear gets one for as long as it is gated."""
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x + 1  # type: ignore[method-assign]
    assert "forward" in layer.__dict__
    assert torch.equal(layer(torch.zeros(2)), torch.ones(2))


def test_a_hook_can_be_called_after_an_error_too() -> None:
    """gate: always_call takes the shadow of a weight away when the forward pass fails."""
    calls: list[str] = []
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: calls.append("hook"), always_call=True)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(3))
    assert calls == ["hook"]


def test_hooks_are_counted_in_these_dictionaries() -> None:
    """conformance, forwards: _forward_hooks, _forward_pre_hooks, _backward_hooks."""
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    layer.register_full_backward_hook(lambda *_: None)
    for hooks in (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks):
        assert len(hooks) == 1


def test_a_parametrized_module_has_these_names() -> None:
    """layers, units, share: classes, paths and keys of weights that share units."""

    class Twice(nn.Module):
        def forward(self, part: Any) -> Any:
            return torch.cat([part, part])

        def right_inverse(self, whole: Any) -> Any:
            return whole[:1]

    layer = nn.Linear(2, 2, bias=False)
    parametrize.register_parametrization(layer, "weight", Twice(), unsafe=True)
    assert type(layer).__name__ == "ParametrizedLinear"
    assert type(layer).__mro__[1] is nn.Linear
    assert [name for name, _ in layer.named_parameters()] == ["parametrizations.weight.original"]
    assert list(layer.state_dict()) == ["parametrizations.weight.original"]
    assert layer.parametrizations.weight.original.shape == (1, 2)  # right_inverse made it
    assert layer.weight.shape == (2, 2)
    assert parametrize.is_parametrized(layer, "weight")


def test_multihead_attention_has_these_parts() -> None:
    """attention, forwards, cost: rows [q | k | v] of in_proj_weight, and what forward reads."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, batch_first=True)
    assert (module.num_heads, module.head_dim, module.bias_k) == (2, 2, None)
    assert not module.add_zero_attn
    x = torch.randn(1, 3, 4)
    q, k, v = (
        nn.functional.linear(x, weight, bias).unflatten(-1, (2, 2)).transpose(1, 2)
        for weight, bias in zip(
            module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True
        )
    )
    heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.out_proj(heads), module(x, x, x)[0])
    apart = nn.MultiheadAttention(4, 2, kdim=3)
    assert apart.in_proj_weight is None  # keys of another width are left dense by this


# -- torch: counting -------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Notes the packets of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.packets: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.packets.append(func._overloadpacket)
        return func(*args, **(kwargs or {}))


def test_formulas_are_found_by_packet_and_count_two_for_a_multiply_add() -> None:
    """cost: flop_registry[func._overloadpacket] is called with out_val and halved."""
    from torch.utils.flop_counter import flop_registry

    a, b = torch.ones(2, 3), torch.ones(3, 5)
    with Operations() as seen:
        out = a @ b
    (packet,) = seen.packets
    assert flop_registry[packet](a, b, out_val=out) == 2 * 2 * 3 * 5


def test_fused_attention_on_a_cpu_is_this_operation() -> None:
    """cost: _scaled_dot_product_flash_attention_for_cpu has no formula of torch's, so ours is."""
    from torch.utils.flop_counter import sdpa_flop_count

    q = torch.ones(1, 2, 3, 8)
    for mask in (None, torch.zeros(3, 3)):
        with Operations() as seen, torch.no_grad():
            nn.functional.scaled_dot_product_attention(q, q, q, mask)
        assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in seen.packets
    assert sdpa_flop_count(q.shape, q.shape, q.shape) == 2 * (2 * 2 * 3 * 3 * 8)


def test_the_fast_path_of_multihead_attention_has_no_formula() -> None:
    """cost: _native_multi_head is named among what cannot be priced."""
    from torch.utils.flop_counter import flop_registry

    assert torch.ops.aten._native_multi_head_attention not in flop_registry


# -- what a search leans on ------------------------------------------------------------


def test_a_compiled_model_holds_the_module_it_was_given() -> None:
    """wrappers: torch.compile is looked through."""
    module = torch.nn.Linear(2, 2)
    compiled = torch.compile(module, backend="eager")
    assert type(compiled).__name__ == "OptimizedModule"
    assert compiled._orig_mod is module


def test_training_arguments_set_up_one_device() -> None:
    """train: the recipe's device takes the place of the one that this property chooses."""
    kind = type(transformers.TrainingArguments.__dict__["_setup_devices"]).__name__
    assert kind == "cached_property"


def test_kernels_are_chosen_by_two_fields_of_a_config() -> None:
    """cutting: they are put back after a proof that ran with other kernels."""
    model = build("clip").model
    model.set_attn_implementation("eager")
    assert model.config.__dict__["_attn_implementation_internal"] == "eager"
    assert "_experts_implementation_internal" in model.config.__dict__


def test_a_restored_callback_is_made_from_its_class_alone() -> None:
    """callback: so that class must know its Compressor."""
    import inspect

    source = inspect.getsource(transformers.Trainer._load_callback_state)
    assert "type(callback)(**args)" in source


def test_an_accelerated_optimizer_holds_the_optimizer_it_was_given() -> None:
    """optimizers: parameters are exchanged in that one."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator()  # it asks the state that this leaves
    inner = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    assert AcceleratedOptimizer(inner).optimizer is inner


def test_modules_keep_their_hooks_where_we_look_for_another_search() -> None:
    """gating: a second Compressor finds the first by its hook."""
    module = torch.nn.Linear(2, 2)
    hook = module.register_forward_pre_hook(lambda *_: None)
    assert len(module._forward_pre_hooks) == 1
    hook.remove()


def test_fsdp2_keeps_units_and_entries_where_a_cut_looks_for_them() -> None:
    """fsdp: a cut gives each entry of a unit a successor, and tells both what has changed."""
    import inspect

    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group, _fsdp_state

    entry = inspect.getsource(_fsdp_param.FSDPParam)
    for name in (
        "_module_info", "_param_fqn", "_post_load_hook_handle", "_setattr_on_modules",
        "_unsharded_param", "all_gather_outputs", "reset_sharded_param",
    ):  # fmt: skip
        assert name in entry, name
    assert "_init_mp_dtypes" in inspect.getsource(_fsdp_param_group.FSDPParamGroup)
    state = inspect.getsource(_fsdp_state)
    for name in ("_state_ctx", "_is_root", "_mp_policy", "_fsdp_param_group", "all_states"):
        assert name in state, name


def test_fsdp2_leaves_in_a_module_what_is_taken_away_with_it() -> None:
    """fsdp: a model that has been trained in parts is an ordinary one again."""
    import inspect

    from torch.distributed import _composable_state
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fsdp_state

    assert hasattr(_composable_state, "_module_state_mapping")
    assert isinstance(REGISTRY_KEY, str)
    assert isinstance(STATE_KEY, str)
    unit = inspect.getsource(_fsdp_param_group.FSDPParamGroup)
    assert "_module_to_pre_save_state_dict_hook_handle" in unit
    assert "_module_to_pre_load_state_dict_hook_handle" in unit
    assert hasattr(torch.distributed.fsdp.FSDPModule, "_get_fsdp_state")
    state = inspect.getsource(_fsdp_state.FSDPState)
    for name in ("_pre_forward_hook_handle", "_post_forward_hook_handle", "def _lazy_init"):
        assert name in state, name


def test_a_module_keeps_buffers_where_they_are_emptied_and_filled() -> None:
    """layerwise, streaming: a model without weights still holds its buffers by these names."""
    module = torch.nn.BatchNorm1d(2)
    assert "running_mean" in module._buffers
    module.register_buffer("made", torch.zeros(1), persistent=False)
    assert "made" in module._non_persistent_buffers_set


def test_a_loaded_model_keeps_the_conversions_of_its_weights() -> None:
    """streaming: a small model is written under the names that the large one was read from."""
    import inspect

    import transformers.core_model_loading as loading

    assert "_weight_conversions" in inspect.getsource(loading)


def test_experts_are_run_by_flags_through_a_registry() -> None:
    """cutting, calibration: widths that no kernel takes, and experts that are taken apart."""
    model = build("mixtral").model
    experts: Any = next(m for name, m in model.named_modules() if name.endswith("experts"))
    for flag in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm"):
        assert isinstance(getattr(experts, flag), bool)
    own = type(experts).forward.__wrapped__
    names = ["self", "hidden_states", "top_k_index", "top_k_weights"]
    assert [*inspect.signature(own).parameters] == names
    moe = importlib.import_module("transformers.integrations.moe")
    assert moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"].__module__ == "vlprune.cutting.grouped"


def test_accelerates_state_can_forget_an_engine_and_keep_the_processes() -> None:
    """engine: the next model would be loaded in parts, and the next Trainer get the old engine."""
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    held = dict(AcceleratorState._shared_state)
    processes = dict(PartialState._shared_state)
    try:
        Accelerator(cpu=True)
        assert AcceleratorState._shared_state
        AcceleratorState._reset_state()
        assert not AcceleratorState._shared_state
        assert PartialState._shared_state
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(held)
        PartialState._shared_state.clear()
        PartialState._shared_state.update(processes)
