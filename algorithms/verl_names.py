"""What of verl 0.9.1 the TOML may name, and why not the rest."""

# The advantage estimators of verl 0.9.1 that need no more than rewards, groups and a greedy baseline, each with whether it
# compares the rollouts of a group.
ADVANTAGES = {
    "grpo": True,
    "grpo_vectorized": True,
    "grpo_passk": True,
    "rloo": True,
    "rloo_vectorized": True,
    "opo": True,
    "reinforce_plus_plus_baseline": True,
    "reinforce_plus_plus": False,
}
# The others, and why they are not there.
NO_ADVANTAGES = {
    "gae": 'it needs a critic; write algorithm.name = "ppo"',
    "remax": 'it needs greedy rollouts; write algorithm.name = "remax"',
    "gpg": 'it corrects once more for groups without signal; write algorithm.name = "gpg"',
    "gdpo": "it needs rewards of several kinds by name",
    "optimal_token_baseline": "it needs the sum over the vocabulary of squared probabilities, which nobody records",
    "tir_optimal_token_baseline": "it needs the sum over the vocabulary of squared probabilities, which nobody records",
}
# The losses of verl 0.9.1 that a weight a token goes through soundly. "gspo" takes a path for its sequence.
SOUND_LOSSES = ("vanilla", "cispo", "gpg", "gspo", "dppo_tv", "dppo_kl")
# Those it does not, and why.
UNSOUND_LOSSES = {
    "geo_mean": "it takes the weights into a geometric mean over the sequence",
    "sapo": "it averages over sequences by itself",
    "clip_cov": "what it clips depends on how the batch is cut into micro-batches",
    "kl_cov": "what it penalises depends on how the batch is cut into micro-batches",
    "bypass_mode": "it computes its own importance weights",
    "dro": "it needs a coefficient of its own, dro_beta, that raygent does not set",
}
