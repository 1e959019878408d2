"""Stand-ins for the originals of the drop-in classes: their attributes, methods and modules, in this project's words.

For tests that need a living module of the original class: whole models saved with torch.save, `from_module`, forks.
`test_compat_conversion.py` holds each to the vectors that the original computed. Nothing of rmc_kernels is used.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


class L0SG(nn.Module):
    """L0SG/relational-rnn-pytorch: `relational_rnn_general.RelationalMemory`."""

    def __init__(
        self,
        mem_slots: int,
        head_size: int,
        input_size: int,
        num_heads: int = 1,
        num_blocks: int = 1,
        forget_bias: float = 1.0,
        input_bias: float = 0.0,
        gate_style: str | None = "unit",
        attention_mlp_layers: int = 2,
        key_size: int | None = None,
        return_all_outputs: bool = False,
    ) -> None:
        super().__init__()
        self.mem_slots, self.head_size, self.num_heads = mem_slots, head_size, num_heads
        self.mem_size = head_size * num_heads
        self.mem_slots_plus_input = mem_slots + 1
        self.num_blocks, self.gate_style, self.attention_mlp_layers = num_blocks, gate_style, attention_mlp_layers
        self.key_size = key_size or head_size
        self.value_size = head_size
        self.qkv_size = 2 * self.key_size + self.value_size
        self.total_qkv_size = self.qkv_size * num_heads
        self.qkv_projector = nn.Linear(self.mem_size, self.total_qkv_size)
        self.qkv_layernorm = nn.LayerNorm([self.mem_slots_plus_input, self.total_qkv_size])
        self.attention_mlp = nn.ModuleList([nn.Linear(self.mem_size, self.mem_size)] * attention_mlp_layers)
        self.attended_memory_layernorm = nn.LayerNorm([self.mem_slots_plus_input, self.mem_size])
        self.attended_memory_layernorm2 = nn.LayerNorm([self.mem_slots_plus_input, self.mem_size])
        self.input_size = input_size
        self.input_projector = nn.Linear(input_size, self.mem_size)
        self.num_gates = 2 * self.calculate_gate_size()
        self.input_gate_projector = nn.Linear(self.mem_size, self.num_gates)
        self.memory_gate_projector = nn.Linear(self.mem_size, self.num_gates)
        self.forget_bias = nn.Parameter(torch.tensor(forget_bias, dtype=torch.float32))
        self.input_bias = nn.Parameter(torch.tensor(input_bias, dtype=torch.float32))
        self.return_all_outputs = return_all_outputs

    def calculate_gate_size(self) -> int:
        return {"unit": self.mem_size, "memory": 1, None: 0}[self.gate_style]

    def repackage_hidden(self, h: Any) -> Any:
        return h.detach() if isinstance(h, Tensor) else tuple(self.repackage_hidden(part) for part in h)

    def initial_state(self, batch_size: int, trainable: bool = False) -> Tensor:
        return torch.stack([torch.eye(self.mem_slots, self.mem_size) for _ in range(batch_size)])

    def multihead_attention(self, memory: Tensor) -> Tensor:
        qkv = self.qkv_layernorm(self.qkv_projector(memory))
        heads = qkv.reshape(*memory.shape[:2], self.num_heads, self.qkv_size)
        q, k, v = torch.split(heads, [self.key_size, self.key_size, self.value_size], -1)
        weights = torch.einsum("bqhk,bshk->bhqs", q / math.sqrt(self.key_size), k).softmax(-1)
        return torch.einsum("bhqs,bshv->bqhv", weights, v).reshape(*memory.shape[:2], -1)

    def attend_over_memory(self, memory: Tensor) -> Tensor:
        for _ in range(self.num_blocks):
            memory = self.attended_memory_layernorm(memory + self.multihead_attention(memory))
            rows = memory
            for linear in self.attention_mlp:
                rows = linear(rows).relu()
            memory = self.attended_memory_layernorm2(memory + rows)
        return memory

    def create_gates(self, inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.memory_gate_projector(memory.tanh()) + self.input_gate_projector(inputs)
        input_gate, forget_gate = gates.chunk(2, -1)
        return (input_gate + self.input_bias).sigmoid(), (forget_gate + self.forget_bias).sigmoid()

    def forward_step(
        self, inputs: Tensor, memory: Tensor, treat_input_as_matrix: bool = False
    ) -> tuple[Tensor, Tensor]:
        rows = inputs.reshape(len(inputs), -1, self.input_size) if treat_input_as_matrix else inputs.flatten(1)[:, None]
        rows = self.input_projector(rows)
        following = self.attend_over_memory(torch.cat([memory, rows], 1))[:, : memory.shape[1]]
        if self.gate_style is not None:
            input_gate, forget_gate = self.create_gates(rows, memory)
            following = input_gate * following.tanh() + forget_gate * memory
        return following.flatten(1), following

    def forward(self, inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.repackage_hidden(memory)
        outputs = []
        for t in range(inputs.shape[1]):
            output, memory = self.forward_step(inputs[:, t], memory)
            outputs.append(output)
        return torch.cat(outputs) if self.return_all_outputs else outputs[-1], memory


class TextGAN(L0SG):
    """williamSYSU/TextGAN-PyTorch: `models.relational_rnn_general.RelationalMemory`."""

    def forward(self, inputs: Tensor, memory: Tensor, treat_input_as_matrix: bool = False) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(inputs.shape[1]):
            output, memory = self.forward_step(inputs[:, t], memory)
            outputs.append(output[:, None])
        return torch.cat(outputs, 1) if self.return_all_outputs else outputs[-1], memory


class LanguageModel(L0SG):
    """L0SG/relational-rnn-pytorch: `relational_rnn_models.RelationalMemory`, with an embedding and a decoder."""

    def __init__(self, mem_slots: int, head_size: int, input_size: int, num_tokens: int, num_heads: int = 1) -> None:
        super().__init__(mem_slots, head_size, input_size, num_heads)
        self.dropout = nn.Dropout()
        self.num_tokens = num_tokens
        self.token_to_input_encoder = nn.Embedding(num_tokens, input_size)
        self.output_to_embed_decoder = nn.Linear(self.mem_slots * self.mem_size, input_size)
        self.embed_to_logit_decoder = nn.Linear(input_size, num_tokens)
        self.embed_to_logit_decoder.weight = self.token_to_input_encoder.weight

    def forward_step(
        self, inputs: Tensor, memory: Tensor, treat_input_as_matrix: bool = False
    ) -> tuple[Tensor, Tensor]:
        embedded = self.dropout(self.token_to_input_encoder(inputs))
        output, memory = super().forward_step(embedded, memory, treat_input_as_matrix)
        return self.embed_to_logit_decoder(self.dropout(self.output_to_embed_decoder(output))), memory


class MultiHeadedAttention(nn.Module):
    """zhjohnchan/R2Gen: `modules.encoder_decoder.MultiHeadedAttention`."""

    def __init__(self, h: int, d_model: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.d_k, self.h = d_model // h, h
        linear = nn.Linear(d_model, d_model)
        self.linears = nn.ModuleList([copy.deepcopy(linear) for _ in range(4)])
        self.attn: Tensor | None = None
        self.dropout = nn.Dropout(p=dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            linear(rows).reshape(len(rows), -1, self.h, self.d_k)
            for linear, rows in zip(self.linears, (query, key, value), strict=False)
        )
        scores = torch.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, -1e9)
        self.attn = self.dropout(scores.softmax(-1))
        return self.linears[-1](torch.einsum("bhqs,bshv->bqhv", self.attn, v).reshape(query.shape))  # type: ignore[no-any-return]


class R2Gen(nn.Module):
    """zhjohnchan/R2Gen: `modules.encoder_decoder.RelationalMemory`."""

    def __init__(self, num_slots: int, d_model: int, num_heads: int = 1) -> None:
        super().__init__()
        self.num_slots, self.num_heads, self.d_model = num_slots, num_heads, d_model
        self.attn = MultiHeadedAttention(num_heads, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model), nn.ReLU())
        self.W = nn.Linear(d_model, d_model * 2)
        self.U = nn.Linear(d_model, d_model * 2)

    def init_memory(self, batch_size: int) -> Tensor:
        return torch.stack([torch.eye(self.num_slots, self.d_model)] * batch_size)

    def forward_step(self, input: Tensor, memory: Tensor) -> Tensor:
        memory = memory.reshape(len(input), self.num_slots, self.d_model)
        rows = torch.cat([memory, input[:, None]], 1)
        following = memory + self.attn(memory, rows, rows)
        following = following + self.mlp(following)
        input_gate, forget_gate = (self.W(input[:, None]) + self.U(memory.tanh())).sigmoid().chunk(2, -1)
        return (input_gate * following.tanh() + forget_gate * memory).flatten(1)  # type: ignore[no-any-return]

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        outputs = []
        for t in range(inputs.shape[1]):
            memory = self.forward_step(inputs[:, t], memory)
            outputs.append(memory)
        return torch.stack(outputs, 1)
