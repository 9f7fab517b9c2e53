"""A copy that would compute something else than its source is found, in Hugging Face's models and in others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ds_stacking.common.errors import UserError
from ds_stacking.growth.blocks import find_blocks
from ds_stacking.growth.blocks_alike import check_blocks_alike
from ds_stacking.growth.operators import layer_map

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 30}
FULL, SLIDING = "full_attention", "sliding_attention"


def gpt2(layers: int, **changes) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=16, n_head=2, vocab_size=30, n_positions=12, **changes))


def llama(layers: int) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZES))


def qwen3(kinds: list[str]) -> nn.Module:
    more = {"num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": True, "sliding_window": 4}
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=len(kinds), layer_types=kinds, **SIZES, **more))


class Stack(nn.Module):
    """Blocks made by `block(index, layers)`."""

    def __init__(self, layers: int, block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(index, layers) for index in range(layers))


class Block(nn.Module):
    """A linear layer that knows things."""

    def __init__(self, **known) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        vars(self).update(known)


def grown(old: nn.Module, new: nn.Module, operator: str = "stack") -> str:
    """What is said of a growth from `old` to `new`; empty where it is let through."""
    blocks = find_blocks(old)
    try:
        check_blocks_alike(old, new, blocks, layer_map(operator, blocks.count, find_blocks(new).count))
    except UserError as error:
        return str(error)
    return ""


def test_blocks_that_differ_in_their_number_only_are_let_through() -> None:
    assert grown(gpt2(2), gpt2(4)) == ""
    assert grown(gpt2(2), gpt2(4), "interleave") == ""
    assert grown(llama(1), llama(3)) == ""
    assert grown(Stack(2, lambda i, n: Block(number=i + 1)), Stack(4, lambda i, n: Block(number=i + 1))) == ""


def test_sliding_windows_of_qwen3() -> None:
    old, new = qwen3([FULL, FULL]), qwen3([FULL, FULL, SLIDING, SLIDING])
    message = grown(old, new)
    assert message.startswith("Block 2 of the grown model cannot take the weights of block 0: ")
    assert "'sliding_attention' there and 'full_attention' in its source" in message
    tokens = torch.arange(12)[None]  # what it would have changed
    states = {name: value for name, value in new.state_dict().items()}
    same = qwen3([FULL] * 4)
    same.load_state_dict(states)
    assert not torch.allclose(new(tokens).logits, same(tokens).logits, atol=1e-4)
    mixed, twice = qwen3([FULL, SLIDING]), qwen3([FULL, SLIDING, FULL, SLIDING])
    assert grown(mixed, twice) == ""
    assert "cannot take" in grown(mixed, twice, "interleave")
    assert grown(mixed, qwen3([FULL, SLIDING, SLIDING]), "0,1,1") == ""
    assert grown(mixed, qwen3([FULL, SLIDING, SLIDING]), "0,1,*") == ""


def test_a_list_in_the_configuration_is_enough() -> None:
    """Qwen3's model itself asks `config.layer_types[i]`, whatever its blocks know."""
    old, new = qwen3([FULL, FULL]), qwen3([FULL] * 4)
    new.config.layer_types = [FULL, FULL, SLIDING, FULL]
    assert "Block 2 of the grown model cannot take the weights of block 0: config.layer_types" in grown(old, new)


def test_scales_by_the_index() -> None:
    scaled = {"scale_attn_by_inverse_layer_idx": True}
    assert "attn.scaling" in grown(gpt2(2, **scaled), gpt2(4, **scaled))
    assert "Block 1" in grown(gpt2(2, **scaled), gpt2(4, **scaled), "interleave")


def test_depth_that_a_block_knows() -> None:
    assert "rate is 0.25" in grown(Stack(2, lambda i, n: Block(rate=i / n)), Stack(4, lambda i, n: Block(rate=i / n)))
    assert "class is" in grown(
        Stack(2, lambda i, n: nn.Sequential(nn.Linear(3, 3), nn.Tanh())),
        Stack(4, lambda i, n: nn.Sequential(nn.Linear(3, 3), nn.Tanh() if i < 2 else nn.Sigmoid())),
    )


def test_what_deepspeed_notes_in_modules_is_no_difference() -> None:
    old = Stack(2, lambda i, n: Block(ds_id=i, applied_pre_backward_ref_cnt=3))
    assert grown(old, Stack(4, lambda i, n: Block(ds_id=7))) == ""


def test_a_missing_first_norm() -> None:
    model = ModernBertForMaskedLM(ModernBertConfig(num_hidden_layers=3, pad_token_id=0, **SIZES))
    with pytest.raises(UserError, match=r"has no nn.ModuleList of blocks with equal parameters"):
        find_blocks(model)
