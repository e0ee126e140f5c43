"""What tests of the weights' way share: the policies an engine was given, and what tokens would cost under each."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raygent.actors.weight_transfer import push_cpu

FITS = 1e-3


class Policies:
    """The weights of each version the engine was given, and pushes of new ones."""

    def __init__(self, engine, folder):
        self.engine, self.folder = engine, folder
        self.version = self.held()
        self.models = {self.version: AutoModelForCausalLM.from_pretrained(folder)}

    def held(self):
        return self.engine.status()[0]["version"]

    def make(self, **changed):
        """Random weights, under a new version."""
        self.version += 1
        torch.manual_seed(self.version)
        config = AutoConfig.from_pretrained(self.folder, **changed)
        self.models[self.version] = AutoModelForCausalLM.from_config(config)
        return self.version, self.models[self.version]

    def push(self, engine=None, **options):
        version, model = self.make()
        return version, push_cpu(model, 0, 0, engine or self.engine, version, **options)

    def gaps(self, call, version):
        """|recorded - plain forward| of each sampled token of `call`, were it of `version`."""
        prompt, sampled = call["prompt_token_ids"], call["response_token_ids"]
        with torch.no_grad():
            logits = self.models[version](torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / call["temperature"]).log_softmax(-1).gather(-1, torch.tensor(sampled)[:, None])[:, 0]
        return np.abs(logprobs.numpy() - np.array(call["logprobs"], np.float32))

    def fits(self, call):
        """Whether each token is of the version it is recorded with."""
        versions = np.array(call["policy_versions"])
        return all((self.gaps(call, int(v))[versions == v] <= FITS).all() for v in np.unique(versions))
