"""Model classes and processes with a `generate` that does more than Transformers' own."""

from __future__ import annotations

import pytest
import torch
from generating import NEW, base_model, left_padded, ordinary
from loop_models import PROMPT, build, byte_tokenizer, config, prompt
from transformers.generation import utils

from specprefill_kernels.integrations import _transformers_rows
from specprefill_kernels.integrations import transformers as integration
from specprefill_kernels.integrations._transformers_rows import call_problem
from specprefill_kernels.integrations.transformers import enable, last_result
from specprefill_kernels.loop import SpecPrefill


@pytest.fixture(scope="module")
def speculator():
    return build("llama", seed=3)


def of_class(generate):
    """The base, as one of a class with this `generate`; `super` is the class that it has by itself."""
    model = base_model()
    above = type(model)
    model.__class__ = type("Own", (above,), {"generate": generate, "above": above, "__module__": above.__module__})
    return model


def cut(self, *args, **kwargs):
    return self.above.generate(self, *args, **kwargs)[:, PROMPT:]


def twice(self, inputs, **kwargs):
    first = self.above.generate(self, inputs, **kwargs)
    return self.above.generate(self, first, **kwargs)


def written_into(self, *args, **kwargs):
    answer = self.above.generate(self, *args, **kwargs)
    answer[:, 0] = 7
    return answer


@pytest.mark.parametrize("generate", [cut, twice, written_into])
def test_a_class_that_changes_the_result_runs_dense(generate, speculator):
    model, ids = of_class(generate), prompt()
    expected = ordinary(model, ids.clone(), max_new_tokens=NEW)
    enable(model, speculator, config())
    assert torch.equal(model.generate(ids, max_new_tokens=NEW), expected)
    assert last_result(model).reason == "Own has a generate of its own"
    assert torch.equal(ids, prompt())


def test_an_instance_that_changes_the_result_runs_dense(speculator):
    model = base_model()
    model.generate = lambda *args, **kwargs: type(model).generate(model, *args, **kwargs)[:, PROMPT:]
    enable(model, speculator, config())
    assert model.generate(prompt(), max_new_tokens=NEW).shape[1] <= NEW
    assert last_result(model).reason == "LlamaForCausalLM has a generate of its own"


def test_the_loop_takes_such_a_class(speculator):
    """Its answer goes nowhere near the class's `generate`."""
    found = [SpecPrefill(base, speculator, config()).generate(prompt(), NEW) for base in (base_model(), of_class(cut))]
    assert found[0].tokens == found[1].tokens


def passed_on(self, *args, **kwargs):
    return self.above.generate(self, *args, **kwargs)


def test_a_class_that_passes_the_result_on_is_sparse(speculator):
    model = of_class(passed_on)
    enable(model, speculator, config())
    model.generate(prompt(), max_new_tokens=NEW)
    assert last_result(model).mode == "sparse"


@pytest.mark.parametrize("spread", ["fsdp", "zero3", None])
@pytest.mark.parametrize("size", [2, 1, None])
def test_processes_that_share_the_parameters_take_the_same_steps(spread, size, speculator, monkeypatch):
    """Generate decides so by itself; a call that says synced_gpus=False has decided otherwise."""
    model = base_model()
    enable(model, speculator, config())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: size is not None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: size)
    monkeypatch.setattr(utils, "is_deepspeed_zero3_enabled", lambda: spread == "zero3")
    if spread == "fsdp":
        model._is_fsdp_managed_module = True  # as FSDP 2 says it
    reason = call_problem(model, {"inputs": prompt()})
    if spread and size == 2:
        assert reason == (
            "synced_gpus, which generate turns on for this model: all processes have to take the same number of steps"
        )
    else:
        assert reason is None
    assert call_problem(model, {"inputs": prompt(), "synced_gpus": False}) is None


def test_what_generate_syncs_by_itself_runs_dense(speculator, monkeypatch):
    model = base_model()
    enable(model, speculator, config())
    called = []
    monkeypatch.setattr(model.generate, "_ordinary", lambda *args, **kwargs: called.append(kwargs))
    monkeypatch.setattr(_transformers_rows, "_syncs_by_itself", lambda given: given is model)
    model.generate(prompt(), max_new_tokens=2)
    assert called == [{"max_new_tokens": 2}]  # the whole call, and no question before it
    assert last_result(model).reason.startswith("synced_gpus, which generate turns on")


def by_place(self, input_ids=None, **kwargs):
    return self.above.generate(self, input_ids, **kwargs)


def alone_refused(self, inputs=None, **kwargs):
    if inputs.shape[0] == 1:
        raise ValueError("one prompt is none")
    return self.above.generate(self, inputs, **kwargs)


def alone_changed(self, inputs=None, **kwargs):
    sequences = self.above.generate(self, inputs, **kwargs)
    return sequences if inputs.shape[0] > 1 else sequences[0]


def test_a_class_that_has_its_own_name_for_ids_takes_batches(speculator):
    models = base_model(), of_class(by_place)
    for model in models:
        enable(model, speculator, config())
    batch, _ = left_padded(150, 120)
    found = [model.generate(**batch, max_new_tokens=NEW) for model in models]
    assert torch.equal(*found)
    found = [model.generate(batch["input_ids"], max_new_tokens=NEW, pad_token_id=0) for model in models]
    assert torch.equal(*found)
    assert [last_result(model).mode for model in models] == ["sparse", "sparse"]


@pytest.mark.parametrize(
    ("generate", "reason"),
    [
        (
            alone_refused,
            "what generate would do could not be found out for one prompt of the batch: one prompt is none",
        ),
        (alone_changed, "Own has a generate of its own, and does not take one prompt"),
    ],
)
def test_a_class_that_takes_no_single_prompt_runs_dense(generate, reason, speculator):
    model = of_class(generate)
    batch, _ = left_padded(150, 120)
    ids = batch.pop("input_ids")
    expected = ordinary(model, ids, **batch, max_new_tokens=NEW)
    enable(model, speculator, config())
    assert torch.equal(model.generate(ids, **batch, max_new_tokens=NEW), expected)
    assert last_result(model).reason == reason


def test_a_batch_of_one_prompt_may_say_what_batches_say(speculator):
    model, tokenizer = base_model(), byte_tokenizer()
    enable(model, speculator, config(), tokenizer=tokenizer)
    chat = [{"role": "user", "content": "The door is blue. " * 9}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = {}
    for name, options in {
        "call": {"protect": [(0, 5)]},
        "batch": {"protect": [[(0, 5)]]},
        "list": {"protect": [[0, 5]]},
        "passage": {"protect": ["door"]},
        "passages": {"protect": (["door"],)},
        "none": {"protect": None},
        "none of one": {"protect": [None]},
        "nothing of one": {"protect": [[]]},
        "chat": {"messages": chat},
        "chats": {"messages": [chat]},
        "unknown chats": {"messages": [None]},
    }.items():
        model.generate(**ids, max_new_tokens=2, **options)
        (found[name],) = (selection.protected for selection in last_result(model).selections)
    assert found["call"] == found["batch"] == found["list"]
    assert found["passage"] == found["passages"] != found["call"]
    assert (
        len({found[name] for name in ("none", "none of one", "nothing of one", "chat", "chats", "unknown chats")}) == 1
    )
    for wrong in ([[(0, 5)], [(0, 5)]], [[[(0, 5)]]], [[5, 0]]):
        with pytest.raises(ValueError, match=r"^protect\[0\]: expected "):
            model.generate(**ids, max_new_tokens=2, protect=wrong)


def test_wrong_arguments_are_no_reasons(speculator, caplog):
    """The ordinary call says what is wrong with them: the log does not say beside it that one runs."""
    integration._said.clear()
    model = base_model()
    enable(model, speculator, config())
    for options in ({"temprature": 0.5}, {"temprature": 0.5, "num_beams": 2}):
        with pytest.raises(ValueError, match="temprature"):
            model.generate(prompt(), max_new_tokens=2, **options)
    assert caplog.text == ""
    assert not integration._said
    assert last_result(model) is None


def test_what_was_said_does_not_grow(speculator, caplog, monkeypatch):
    """An error's text may name what the call was given, and be another one each time."""
    integration._said.clear()
    monkeypatch.setattr(integration, "_MOST_SAID", 4)
    count = 0

    def refuses(self, inputs=None, custom_generate=None, **kwargs):
        nonlocal count
        if custom_generate is not None:
            count += 1
            raise ValueError(f"not like this, for the {count}th time")
        return self.above.generate(self, inputs, **kwargs)

    model = of_class(refuses)
    enable(model, speculator, config())
    for _ in range(3):
        model.generate(prompt(), max_new_tokens=2)
    assert last_result(model).reason.endswith("for the 3th time")
    assert caplog.text.count("generate runs dense: what generate would do could not be found out: ") == 1
    for index in range(9):
        model.generate._run_dense((prompt(),), {"max_new_tokens": 1}, f"reason {index}")
    assert caplog.text.count("generate runs dense: reason") == 9
    assert len(integration._said) <= 4
