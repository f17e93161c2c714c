"""Changes that break a loss and that several losses have in common: the text in its source, and what replaces it."""

LOG_RATIO = [
    ("policy - reference", "reference - policy"),
    ("policy - reference", "policy"),
    ("policy - reference", "policy + reference"),
]
PAIRWISE = [
    ("beta * gap(", "gap("),
    ("beta * gap(", "1 / beta * gap("),
    ("beta * gap(", "-beta * gap("),
]
CLASSIFIED = [
    ("-(pairs * logsigmoid(margin))", "(pairs * logsigmoid(margin))"),
    ("logsigmoid(margin)", "logsigmoid(-margin)"),
    ("logsigmoid(margin)", "margin.sigmoid()"),
    ("(pairs * logsigmoid(margin)).sum((-2, -1))", "(pairs * logsigmoid(margin)).mean((-2, -1))"),
    ("(pairs * logsigmoid(margin))", "((pairs > 0) * logsigmoid(margin))"),
    ("(pairs * logsigmoid(margin))", "(pairs.mT * logsigmoid(margin))"),
]
PAIRED_VALUE = [("math.log(2) * pairs", "pairs"), ("math.log(2) * pairs", "math.log(3) * pairs")]
SMOOTHED = [
    ("(1 - label_smoothing) * agree", "agree"),
    ("(1 - label_smoothing) * agree", "(1 - label_smoothing) * disagree"),
    ("label_smoothing * disagree", "disagree"),
    ("label_smoothing * disagree", "label_smoothing * agree"),
    ("logsigmoid(margin), logsigmoid(-margin)", "logsigmoid(-margin), logsigmoid(margin)"),
]
REWARDED = [
    ("beta * (policy", "1 / beta * (policy"),
    ("beta * (policy", "(policy"),
    ("beta * (policy", "-beta * (policy"),
]
RATIO = [
    ("ratio(policy_tokens, behavior_tokens)", "ratio(behavior_tokens, policy_tokens)"),
    ("ratio(policy_tokens, behavior_tokens)", "ratio(policy_tokens, policy_tokens)"),
    ("ratio(policy_tokens, behavior_tokens)", "(policy_tokens - behavior_tokens)"),
    ("ratio(policy_tokens, behavior_tokens)", "ratio(policy_tokens, behavior_tokens).detach()"),
    ("advantages, clip=clip", "-advantages, clip=clip"),
    ("advantages, clip=clip", "advantages, clip=2 * clip"),
    ("advantages, clip=clip", "advantages, clip=1e9"),
    ("clipped(ratio", "-clipped(ratio"),
]
SOFT_LABELS = [
    ("rewards / alpha", "rewards * alpha"),
    ("rewards / alpha", "rewards"),
    ("rewards / alpha", "-rewards / alpha"),
    ("softmax(rewards / alpha, dim=-1)", "softmax(rewards / alpha, dim=0)"),
    ("softmax(rewards / alpha, dim=-1)", "(rewards / alpha).exp()"),
]
