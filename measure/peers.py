"""The same model and prompts in transformers' `generate`, plain and assisted by the draft."""
import time
from collections import Counter

import torch

from batch import Stats
from errors import UserError


def transformers_contestants(pair, sampling, new_tokens, k):
    """{label: contestant} for bench.compare. The weights are shared with ours, not copied."""
    try:
        import transformers
    except ImportError:
        raise UserError("--vs-transformers needs transformers: pip install transformers") from None

    class Clock(transformers.StoppingCriteria):
        """Called after every step of generate; stops nothing."""
        def __init__(self):
            self.ticks = []

        def __call__(self, ids, scores, **_):
            if ids.is_cuda:
                torch.cuda.synchronize()
            self.ticks.append((time.perf_counter(), ids.shape[1]))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    class Contestant:
        def __init__(self, mode, helper):
            self.mode, self.helper, self.options, self.share, self.stats = mode, helper, None, None, Stats()

        @torch.inference_mode()
        def run(self, group, seeds):
            torch.manual_seed(seeds[0])
            clock, ids = Clock(), torch.tensor(group, device=pair.target.device)
            how = dict(do_sample=True, temperature=sampling.temperature, top_k=0) if sampling.temperature else \
                dict(do_sample=False)
            began = time.perf_counter()
            out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=0,
                                  eos_token_id=sorted(pair.stop_ids) or None, assistant_model=self.helper,
                                  stopping_criteria=transformers.StoppingCriteriaList([clock]), **how)
            (first, start), (end, length) = clock.ticks[0], clock.ticks[-1]
            rounds = len(clock.ticks) - 1
            return Counter(tokens=length - start, seconds=end - first, rounds=rounds, sequence_rounds=rounds,
                           first=first - began, left_out=1), [row[ids.shape[1]:].tolist() for row in out]

    target = to_transformers(pair.target, transformers)
    found = {"transformers generate": Contestant("transformers", None)}
    if pair.draft is not None and pair.draft.d2t is not None:
        print("transformers assisted: left out, the draft's vocabulary isn't the target's")
    elif pair.draft is not None:
        draft = to_transformers(pair.draft, transformers)
        draft.generation_config.num_assistant_tokens = k
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        found["transformers assisted"] = Contestant("transformers assisted", draft)
    return found


def to_transformers(model, transformers):
    """A LlamaForCausalLM over the very tensors of a model of ours."""
    config = transformers.LlamaConfig(**{key: value for key, value in model.config.to_hf().items()
                                         if key not in ("architectures", "model_type", "torch_dtype")})
    with torch.device(model.device):
        other = transformers.LlamaForCausalLM._from_config(config, dtype=model.dtype)
    other.load_state_dict({name: view.detach() for name, view in model.hf_tensors()}, strict=False, assign=True)
    other.tie_weights()
    return other.eval()
