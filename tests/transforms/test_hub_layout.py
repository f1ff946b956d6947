"""What comes out is what ``save_pretrained`` of the live model writes, key for key and bit for bit.

The table names a tiny config for each architecture; the truth is transformers' own file. The child
process of ``ckpt_tools.hub.reference`` is called in this one, because transformers is loaded here anyway.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout, UsageError
from ckpt_tools.hub.reference import LiveTensor, ReferenceModel, SavedTensor, _parsed, child
from ckpt_tools.hub.reference.recipes import Joined, Live, NewValues, Strided
from ckpt_tools.tensors.catalogue import Catalogue, FlatRange, Fragment, Stored
from ckpt_tools.tensors.dtypes import BFLOAT16, BY_NAME, FLOAT32
from ckpt_tools.transforms.hub_layout import HubLayout, hub_layout
from ckpt_tools.transforms.live_layout import live_layout
from tests.support.sampled import sampled

Config = dict[str, Any]

# -- the table -------------------------------------------------------------------------------------

TEXT: Config = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = TEXT | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MIXTRAL = TEXT | dict(num_local_experts=4)
DEEPSEEK = TEXT | dict(
    num_key_value_heads=4,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
)
LINEAR = dict(
    num_hidden_layers=4,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1)
ENCODER_DECODER: Config = dict(
    vocab_size=96,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
)
T5: Config = dict(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
VISION: Config = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
)
QWEN_VISION: Config = dict(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, patch_size=14
)
QWEN3_VISION = QWEN_VISION | dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
MROPE = dict(
    rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10_000.0)
)
IMAGE = dict(image_token_index=90)
QWEN_TOKENS = dict(
    image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93
)


def both(text: Config, vision: Config, **more: Any) -> Config:
    return dict(text_config=text, vision_config=vision, **more)


def kind(model_type: str, config: Config) -> Config:
    return dict(config, model_type=model_type)


CLIP = kind("clip_vision_model", VISION)
SIGLIP = kind("siglip_vision_model", VISION)

# Class name, with a remark after a space where a class stands twice.
ARCHITECTURES: dict[str, Config] = {
    # dense
    "LlamaForCausalLM": TEXT,
    "LlamaForCausalLM tied": TEXT | dict(tie_word_embeddings=True),
    "LlamaForSequenceClassification": TEXT | dict(num_labels=3),
    "MistralForCausalLM": TEXT,
    "Qwen2ForCausalLM": TEXT,
    "Qwen3ForCausalLM tied": TEXT | dict(tie_word_embeddings=True),
    "Gemma2ForCausalLM": TEXT,
    "Gemma3ForCausalLM": TEXT,
    "Olmo2ForCausalLM": TEXT,
    "Olmo3ForCausalLM": TEXT,
    "Phi3ForCausalLM": TEXT,
    "GPT2LMHeadModel": dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "GPTNeoXForCausalLM": TEXT,
    "BertForMaskedLM": TEXT,
    "NomicBertForMaskedLM": TEXT,
    "GteForMaskedLM": TEXT,
    "JinaEmbeddingsV3ForMaskedLM": TEXT,
    "HrmTextForCausalLM": TEXT,
    # state space and hybrid
    "Mamba2ForCausalLM": dict(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8,
        n_groups=2,
    ),
    "JambaForCausalLM": MOE | dict(
        num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, use_mamba_kernels=False,
    ),
    "NemotronHForCausalLM": DEEPSEEK | dict(
        layers_block_type=["mamba", "attention", "moe", "mlp"], num_hidden_layers=4,
        moe_shared_expert_intermediate_size=16, mamba_num_heads=8, mamba_head_dim=8, n_groups=2,
        ssm_state_size=4,
    ),
    "GraniteMoeHybridForCausalLM": MIXTRAL | MAMBA | dict(
        shared_intermediate_size=16, layer_types=["mamba", "attention"]
    ),
    "OlmoHybridForCausalLM": TEXT | dict(layer_types=["linear_attention", "full_attention"]),
    "KimiLinearForCausalLM": DEEPSEEK | dict(num_experts=4),
    "Qwen3NextForCausalLM": MOE | LINEAR | dict(shared_expert_intermediate_size=24),
    # mixture of experts
    "MixtralForCausalLM": MIXTRAL,
    "OlmoeForCausalLM": MOE,
    "FlexOlmoForCausalLM": MOE,
    "Qwen2MoeForCausalLM": MOE | dict(shared_expert_intermediate_size=24),
    "Qwen3MoeForCausalLM": MOE,
    "DeepseekV2ForCausalLM": DEEPSEEK,
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "DeepseekV4ForCausalLM": DEEPSEEK,
    "GptOssForCausalLM": MIXTRAL | dict(num_experts_per_tok=2),
    "GraniteMoeForCausalLM": MIXTRAL,
    "PhimoeForCausalLM": MIXTRAL,
    "MiniMaxForCausalLM": MIXTRAL,
    "MiniMaxM2ForCausalLM": MIXTRAL,
    "HunYuanMoEV1ForCausalLM": MOE | dict(moe_topk=2),
    "Ernie4_5_MoeForCausalLM": TEXT | dict(
        moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "Glm4MoeForCausalLM": DEEPSEEK,
    "LongcatFlashForCausalLM": DEEPSEEK | dict(
        ffn_hidden_size=48, expert_ffn_hidden_size=16, zero_expert_num=1, moe_topk=2
    ),
    "Llama4ForCausalLM": MIXTRAL | dict(intermediate_size_mlp=48),
    "Inkling2ForCausalLM": DEEPSEEK,
    # encoder and decoder
    "T5ForConditionalGeneration": T5,
    "T5ForConditionalGeneration gated": T5 | dict(feed_forward_proj="gated-gelu"),
    "BartForConditionalGeneration": ENCODER_DECODER,
    "BartForConditionalGeneration untied": ENCODER_DECODER | dict(tie_word_embeddings=False),
    "MarianMTModel": ENCODER_DECODER,
    "WhisperForConditionalGeneration": ENCODER_DECODER | dict(
        num_mel_bins=8, max_source_positions=16, max_target_positions=16
    ),
    # vision, and with language
    "ViTForImageClassification": VISION,
    "CLIPModel": both(TEXT, VISION, projection_dim=16),
    "RadioModel": VISION,
    "LlavaForConditionalGeneration": both(kind("llama", TEXT), CLIP, **IMAGE),
    "LlavaNextForConditionalGeneration": both(kind("llama", TEXT), CLIP, **IMAGE),
    "LlavaOnevisionForConditionalGeneration": both(
        kind("qwen2", TEXT), SIGLIP, video_token_index=91, **IMAGE
    ),
    "PaliGemmaForConditionalGeneration": both(
        kind("gemma", TEXT), SIGLIP, projection_dim=32, **IMAGE
    ),
    "Gemma3ForConditionalGeneration": both(
        kind("gemma3_text", TEXT), SIGLIP, mm_tokens_per_image=4, **IMAGE
    ),
    "ShieldGemma2ForImageClassification": both(
        kind("gemma3_text", TEXT), SIGLIP, mm_tokens_per_image=4, **IMAGE
    ),
    "Qwen2VLForConditionalGeneration": both(
        TEXT | MROPE,
        dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=14),
        **QWEN_TOKENS,
    ),
    "Qwen2_5_VLForConditionalGeneration": both(TEXT | MROPE, QWEN_VISION, **QWEN_TOKENS),
    "Qwen3VLForConditionalGeneration": both(TEXT | MROPE, QWEN3_VISION, **QWEN_TOKENS),
    "Qwen3VLMoeForConditionalGeneration": both(
        MOE | MROPE | dict(moe_intermediate_size=24), QWEN3_VISION, **QWEN_TOKENS),
    "InternVLForConditionalGeneration": both(
        kind("qwen2", TEXT), VISION | dict(image_size=[28, 28], patch_size=[14, 14]),
        image_token_id=90,
    ),
    "Mistral3ForConditionalGeneration": both(
        kind("mistral", TEXT), kind("pixtral", VISION), **IMAGE
    ),
    "MistralLarge4ForConditionalGeneration": both(DEEPSEEK, kind("pixtral", VISION)),
    "Ernie4_5_VLMoeForConditionalGeneration": both(
        TEXT | MROPE | dict(
            moe_intermediate_size=[16, 8], moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"],
        ),
        dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=14),
    ),
    "AriaForConditionalGeneration": both(
        TEXT | dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        kind("idefics3_vision", VISION), projector_patch_to_query_dict={4: 2},
    ),
    "VoxtralForConditionalGeneration": dict(
        text_config=kind("llama", TEXT),
        audio_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_mel_bins=8, max_source_positions=16,
        ),
        audio_token_id=90,
    ),
}  # fmt: skip

# How a model may have been loaded before it was trained: its own names, and with prefixes changed.
LOADED = [
    "LlamaForCausalLM tied",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "LlavaForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "ShieldGemma2ForImageClassification",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Ernie4_5_VLMoeForConditionalGeneration",
]

# transformers 5.23 loads its own live names of these and saves one of them under another.
DRIFTING = {"Ernie4_5_VLMoeForConditionalGeneration"}


# -- the machinery ---------------------------------------------------------------------------------


class Case:
    """A live model, its state on disk, and what transformers writes of it."""

    def __init__(self, title: str, directory: Path) -> None:
        model_class = getattr(transformers, title.split()[0], None)
        if model_class is None:
            pytest.skip("this transformers does not have the class")
        torch.manual_seed(0)
        self.model = model_class(model_class.config_class(**ARCHITECTURES[title]))
        fill(self.model)
        self.directory = directory
        self.truth = self.save(self.model, "truth")

    @property
    def config(self) -> Config:
        data = json.loads((self.directory / "truth" / "config.json").read_text())
        assert isinstance(data, dict)
        return data

    def save(self, model: Any, name: str, **options: Any) -> dict[str, torch.Tensor]:
        model.save_pretrained(self.directory / name, **options)
        return load_file(self.directory / name / "model.safetensors")

    def reference(self, like: set[str] | None = None) -> ReferenceModel:
        question = dict(
            config=self.config,
            architecture=type(self.model).__name__,
            like_names=None if like is None else sorted(like),
            code_dir=None,
            trust_remote_code=False,
            modules=None,
        )
        answer = json.dumps(child._answer(json.loads(json.dumps(question))))
        reference = _parsed(json.loads(answer))
        assert reference is not None
        return reference

    def state(self, tensors: dict[str, torch.Tensor] | None = None) -> Catalogue:
        return stored(tensors or self.model.state_dict(), self.directory / "state.bin")


def fill(model: torch.nn.Module) -> None:
    """Random values, so that no two places hold the same."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape))


def stored(state: dict[str, torch.Tensor], path: Path) -> Catalogue:
    """The state in a file, each tensor in two runs that lie apart, shared ones once."""
    tensors: dict[str, Stored] = {}
    ties: dict[str, str] = {}
    seen: dict[int, str] = {}
    with path.open("wb") as file:
        for name, tensor in state.items():
            if tensor.numel() and tensor.data_ptr() in seen:
                ties[name] = seen[tensor.data_ptr()]
                continue
            seen[tensor.data_ptr()] = name
            flat, cut = tensor.contiguous().reshape(-1), tensor.numel() // 3
            fragments = []
            for low, high in ((0, cut), (cut, tensor.numel())):
                file.write(bytes(64 - file.tell() % 64))
                fragments.append(Fragment(path, file.tell(), FlatRange(low, high)))
                file.write(flat[low:high].view(torch.uint8).numpy().tobytes())
            dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
            tensors[name] = Stored(dtype, tuple(tensor.shape), fragments)
    return Catalogue(tensors, ties)


def assert_is(result: HubLayout, truth: dict[str, torch.Tensor]) -> None:
    assert set(result.catalogue) == set(truth)
    for name, tensor in result.catalogue.items():
        loaded = tensor.load()
        assert loaded.shape == truth[name].shape, name
        assert loaded.dtype == truth[name].dtype, name
        assert loaded.numpy().tobytes() == truth[name].numpy().tobytes(), name
    assert not result.unexpected


# Their hub tensors take every other row of a live one, and no cut along an axis gives that.
INTERLEAVED = ("Inkling2ForCausalLM", "MistralLarge4ForConditionalGeneration")


def assert_is_live(made: Catalogue, live: dict[str, torch.Tensor], *, whole: bool) -> None:
    """What was made is the model in memory, bit for bit; the rest keeps its hub names."""
    known = [name for name in live if name in made or name in made.ties]
    assert known
    for name in known:
        assert torch.equal(made[name].load(), live[name]), name
    assert (len(known) == len(live)) == whole


# -- states of every architecture ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("title", sampled(ARCHITECTURES))
def test_live_state_becomes_what_save_pretrained_writes(title: str, tmp_path: Path) -> None:
    case = Case(title, tmp_path)
    reference = case.reference()
    result = hub_layout(case.state(), reference)
    assert_is(result, case.truth)
    assert dict(result.catalogue.ties) == reference.hub_ties
    assert set(result.ignored) == reference.ignored

    again = hub_layout(case.state(case.truth), reference)
    assert_is(again, case.truth)
    assert not again.renamed
    assert not again.converted

    back, _ = live_layout(case.state(case.truth), reference)
    live = {n: v for n, v in case.model.state_dict().items() if n not in reference.ignored}
    assert_is_live(back, live, whole=title not in INTERLEAVED)


@pytest.mark.slow
@pytest.mark.parametrize("title", LOADED)
@pytest.mark.parametrize("layout", ["hub", "live"])
def test_names_of_the_directory_that_was_loaded_come_back(
    title: str, layout: str, tmp_path: Path
) -> None:
    """Without --like the legacy names are written; with it, the names of that directory."""
    case = Case(title, tmp_path)
    like = case.save(case.model, "like", save_original_format=layout == "hub")
    reference = case.reference(set(like))
    assert_is(hub_layout(case.state(), reference), like)
    assert_is(hub_layout(case.state(like), reference), like)
    if title not in DRIFTING:
        loaded = type(case.model).from_pretrained(tmp_path / "like")
        assert set(case.save(loaded, "again")) == set(like)


@pytest.mark.parametrize(
    "title", [t for t in LOADED if "Mo" not in t and "Mixtral" not in t and "Moe" not in t]
)
def test_a_state_with_legacy_prefixes_takes_the_new_ones_of_like(
    title: str, tmp_path: Path
) -> None:
    case = Case(title, tmp_path)
    like = case.save(case.model, "like", save_original_format=False)
    result = hub_layout(case.state(case.truth), case.reference(set(like)))
    assert_is(result, like)


@pytest.mark.parametrize(
    ("title", "prefix"), [("CLIPVisionModel", "vision_model."), ("CLIPTextModel", "text_model.")]
)
def test_a_prefix_that_only_like_knows(
    title: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VISION if "Vision" in title else TEXT
    monkeypatch.setitem(ARCHITECTURES, title, config)
    case = Case(title, tmp_path)
    like = {prefix + name: tensor for name, tensor in case.truth.items()}
    save_file(like, tmp_path / "truth" / "model.safetensors", {"format": "pt"})
    truth = case.save(type(case.model).from_pretrained(tmp_path / "truth"), "again")
    assert set(truth) == set(like)
    assert_is(hub_layout(case.state(), case.reference(set(like))), truth)
    assert_is(hub_layout(case.state(case.truth), case.reference()), case.truth)


# -- states that are not quite the model's ---------------------------------------------------------


def model(
    live: dict[str, tuple[int, ...]],
    saved: dict[str, SavedTensor] | None = None,
    tied: dict[str, SavedTensor] | None = None,
    **more: Any,
) -> ReferenceModel:
    same = {
        name: SavedTensor(shape, Live(name))
        for name, shape in live.items()
        if name not in more.get("ties", {}) and name not in more.get("ignored", ())
    }
    return ReferenceModel(
        **dict(
            architecture="A",
            model_type="a",
            live={name: LiveTensor(shape, "parameter") for name, shape in live.items()},
            saved=same if saved is None else saved,
            tied=tied or {},
            ties={},
            aliases={},
            ignored=frozenset(),
            float32_under_bfloat16=frozenset(),
            float32_under_float16=frozenset(),
        )
        | more
    )


def tensor(*shape: int) -> Stored:
    numel = torch.Size(shape).numel()
    return Stored(FLOAT32, shape, [Fragment(Path("file"), 0, FlatRange(0, numel))])


class TestTies:
    tied = model(
        {"embed": (4, 2), "head": (4, 2)},
        tied={"hub.head": SavedTensor((4, 2), Live("head"))},
        saved={"hub.embed": SavedTensor((4, 2), Live("embed"))},
        ties={"head": "embed"},
    )

    @pytest.mark.parametrize(("kept", "alias"), [("embed", "head"), ("head", "embed")])
    def test_the_name_that_save_pretrained_keeps(self, kept: str, alias: str) -> None:
        only = tensor(4, 2)
        result = hub_layout(Catalogue({kept: only}, {alias: kept}), self.tied)
        assert list(result.catalogue) == ["hub.embed"]
        assert result.catalogue["hub.embed"] is only
        assert dict(result.catalogue.ties) == {"hub.head": "hub.embed"}
        assert not result.unexpected

    def test_a_state_that_has_only_the_name_that_is_left_out(self) -> None:
        result = hub_layout(Catalogue({"head": tensor(4, 2)}), self.tied)
        assert list(result.catalogue) == ["hub.embed"]

    def test_two_tensors_under_tied_names_stay_two(self) -> None:
        result = hub_layout(Catalogue({"embed": tensor(4, 2), "head": tensor(4, 2)}), self.tied)
        assert list(result.catalogue) == ["hub.embed", "hub.head"]
        assert not result.catalogue.ties

    def test_a_state_in_the_hub_layout_may_keep_the_other_name(self) -> None:
        result = hub_layout(Catalogue({"hub.head": tensor(4, 2)}), self.tied)
        assert list(result.catalogue) == ["hub.embed"]


def test_halves_are_joined_along_the_axis_that_the_recipe_names(tmp_path: Path) -> None:
    halves = {"left": torch.arange(6.0).view(2, 3), "right": torch.arange(4.0).view(2, 2)}
    joined = Joined((Live("left"), Live("right")), 1)
    fused = model({"left": (2, 3), "right": (2, 2)}, {"both": SavedTensor((2, 5), joined)})

    result = hub_layout(stored(halves, tmp_path / "x.safetensors"), fused)

    assert result.catalogue["both"].load().tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 2, 3]]


def test_a_state_that_could_be_in_either_layout_is_taken_for_the_live_one(tmp_path: Path) -> None:
    """A square matrix that the hub has transposed, under one name: training saves what is live."""
    turned = model({"w": (2, 2)}, {"w": SavedTensor((2, 2), Strided(Live("w"), 0, (2, 2), (1, 2)))})
    state = stored({"w": torch.arange(4.0).view(2, 2)}, tmp_path / "x.safetensors")

    assert hub_layout(state, turned).catalogue["w"].load().tolist() == [[0, 2], [1, 3]]


def test_what_the_model_does_not_have_is_kept_and_named() -> None:
    state = Catalogue({"a": tensor(2), "v_head": tensor(3)}, {"v_alias": "v_head"})
    result = hub_layout(state, model({"a": (2,), "b": (2,)}))
    assert list(result.catalogue) == ["a", "v_head"]
    assert result.unexpected == ("v_head", "v_alias")
    assert dict(result.catalogue.ties) == {"v_alias": "v_head"}


def test_what_is_never_saved_is_left_out_and_named() -> None:
    state = Catalogue({"a": tensor(2), "positions": tensor(3)})
    reference = model({"a": (2,), "positions": (3,)}, ignored=frozenset({"positions"}))
    result = hub_layout(state, reference)
    assert list(result.catalogue) == ["a"]
    assert result.ignored == ("positions",)


def test_a_fused_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    case = Case("MixtralForCausalLM", tmp_path)
    reference = case.reference()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    state = {n: tensor(*t.shape) for n, t in reference.live.items() for t in [t]}
    state[name] = tensor(5, *reference.live[name].shape[1:])
    with pytest.raises(UsageError, match=r"its shape is \(5, .* the config gives \(4, ") as error:
        hub_layout(Catalogue(state), reference)
    assert error.value.tensor == name


def test_missing_fused_experts_are_left_out(tmp_path: Path) -> None:
    case = Case("MixtralForCausalLM", tmp_path)
    state = dict(case.state().items())
    del state["model.layers.1.mlp.experts.down_proj"]
    result = hub_layout(Catalogue(state), case.reference())
    assert case.truth.keys() - result.catalogue.keys() == {
        f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight" for i in range(4)
    }


def test_a_computed_tensor_is_refused() -> None:
    reference = model({"a": (2,)}, {"b": SavedTensor((2,), NewValues("aten.exp.default"))})
    with pytest.raises(UnsupportedLayout, match="computes it"):
        hub_layout(Catalogue({"a": tensor(2)}), reference)


def test_a_state_in_both_layouts_is_refused() -> None:
    reference = model({"a": (2,), "c": (2,)}, {
        "b": SavedTensor((2,), Live("a")), "d": SavedTensor((2,), Live("c"))
    })  # fmt: skip
    state = Catalogue({"a": tensor(2), "b": tensor(2), "c": tensor(2)})
    with pytest.raises(DamagedCheckpoint, match="holds it a second time as a"):
        hub_layout(state, reference)


def test_names_of_float32_tensors_are_known_in_both_layouts(tmp_path: Path) -> None:
    reference = Case("Ernie4_5_MoeForCausalLM", tmp_path).reference()
    names = {live for live in reference.hub_names if "e_score_correction_bias" in live}
    names |= {reference.hub_names[name] for name in names}
    assert len(names) == 2
    names.add("model.layers.1.mlp.gate.weight")
    assert reference.float32_under_bfloat16 == reference.float32_under_float16 == names


def test_a_cast_state_is_cast_still(tmp_path: Path) -> None:
    from ckpt_tools.tensors.derived import cast

    case = Case("OlmoeForCausalLM", tmp_path)
    state = Catalogue({name: cast(t, BFLOAT16) for name, t in case.state().items()})
    result = hub_layout(state, case.reference())
    assert_is_bf16 = {name: t.to(torch.bfloat16) for name, t in case.truth.items()}
    for name, lazy in result.catalogue.items():
        assert torch.equal(lazy.load(), assert_is_bf16[name]), name
