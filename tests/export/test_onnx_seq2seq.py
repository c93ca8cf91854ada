"""Encoder-decoder models before they are traced: the two halves are the model; graphs are cut to their outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

from rankwise.errors import WorkError
from rankwise.export.certificate import answer_logits
from rankwise.export.onnx_defaults import check_inputs
from rankwise.export.onnx_runtime import Decoding, write_answers
from rankwise.export.onnx_seq2seq_graph import _cache_shapes, _Decoder, _Encoder, _pruned
from rankwise.models.seq2seq import start_token_id, writes_apart
from tests import tiny

QUESTION, ANSWER = [tiny.token_ids(1, length, seed)[0].tolist() for seed, length in enumerate((9, 6))]


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "mt5", "bart"])
def test_encoder_and_decoder_with_their_caches_are_the_model(family):
    """The question once, the answer whole and token by token behind an empty cache; a padded row beside it."""
    model = getattr(tiny, family)()
    wanted = answer_logits(model, QUESTION, ANSWER)
    width = model.get_input_embeddings().weight.shape[1]
    encoder, decoder = _Encoder(model, []), _Decoder(model, [], width)
    ids = torch.tensor([QUESTION, [*QUESTION[:4], *[259] * 5]])
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    source = list(encoder(ids, mask, []))
    assert len(source) == len(_cache_shapes(model)) == 2 * 2
    shifted = torch.tensor([[start_token_id(model), *ANSWER[:-1]]] * 2)
    empty = [torch.zeros(2, heads, 0, size) for heads, size in _cache_shapes(model)]
    logits, *past = decoder(shifted, mask, empty, source, [])
    assert torch.allclose(logits[0], wanted, atol=1e-5) and past[0].shape[2] == len(ANSWER)
    assert torch.allclose(logits[1], answer_logits(model, QUESTION[:4], ANSWER), atol=1e-5), "padded on the right"
    past = empty
    for place in range(len(ANSWER)):
        stepped, *past = decoder(shifted[:, place : place + 1], mask, past, source, [])
        assert torch.allclose(stepped[0, 0], wanted[place], atol=1e-5)


def test_who_writes_apart():
    assert writes_apart(tiny.t5()) and not writes_apart(tiny.llama()) and not writes_apart(tiny.bert_classifier())


def test_a_graph_is_cut_to_what_its_outputs_need():
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
        helper.make_node("MatMul", ["h", "v"], ["z"]),
    ]
    tensors = [from_array(np.eye(2, dtype=np.float32), name) for name in ("w", "v")]
    given, wanted = value("x", TensorProto.FLOAT, [1, 2]), value("y", TensorProto.FLOAT, [1, 2])
    model = helper.make_model(helper.make_graph(nodes, "g", [given], [wanted], tensors))
    assert [node.op_type for node in _pruned(model).graph.node] == ["MatMul", "Relu"]
    assert [tensor.name for tensor in model.graph.initializer] == ["w"]


def test_each_adapter_input_is_in_both_graphs_and_read_by_one():
    value = helper.make_tensor_value_info

    def graph(read: str):
        inputs = [value(name, TensorProto.FLOAT, [1]) for name in ("a", "b")]
        return helper.make_model(
            helper.make_graph(
                [helper.make_node("Relu", [read], ["y"])], "g", inputs, [value("y", TensorProto.FLOAT, [1])]
            )
        )

    check_inputs([graph("a"), graph("b")], ["a", "b"])
    with pytest.raises(WorkError, match=r"has lost 1 of its 2 adapter inputs \('b'\)"):
        check_inputs([graph("a"), graph("a")], ["a", "b"])


def test_answers_begin_with_what_they_have_to_and_end_at_a_stop():
    follows = {0: 4, 1: 5, 4: 6, 5: 2, 7: 4, 6: 6, 2: 2}

    def behind(ids: np.ndarray) -> np.ndarray:
        return np.eye(8)[[follows[int(token)] for token in ids[:, -1]]]

    rows = np.array([[0], [1]])
    assert write_answers(behind, rows, Decoding(3, (2,), 3)) == [[4, 6, 6], [5]]
    assert write_answers(behind, rows, Decoding(2, (2,), 3), first_id=7) == [[7, 4], [7, 4]]
