"""Values that no configuration takes."""

import math

INFINITY, NAN = math.inf, math.nan

#: field, a value that is refused, and a word of the message that says what is allowed
REFUSED = [
    *[("r", value, "positive integer") for value in (0, -1, 1.5, 8.0, "8", True, None, NAN)],
    *[("lora_alpha", value, "positive number") for value in (0, -1, "16", True, None, NAN, INFINITY)],
    *[("lora_dropout", value, "[0, 1)") for value in (1, 1.0, 1.5, -0.1, "0.1", True, None, NAN)],
    *[("bias", value, "'none', 'all', 'lora_only'") for value in ("None", "", None, True, ["all"])],
    *[("task_type", value, "'SEQ_CLS'") for value in ("seq_cls", "", 3)],
    *[(field, value, "True or False") for field in ("use_rslora", "use_dora", "lora_bias") for value in (1, None, "yes")],
    *[("init_lora_weights", value, "'olora'") for value in (1, None, "pisa", "PiSSA", "", ["pissa"], 0, "CorDA")],
    *[("init_lora_weights", f"pissa_niter_{n}", "'pissa_niter_N'") for n in ("0", "", "-1", "1.5", "04", "4x", "4\n")],
    *[("target_modules", value, "list of module names") for value in ([1], [""], 3, {"q": 1}, [None])],
    *[("exclude_modules", value, "list of module names") for value in ([1], [""], 3)],
    *[("modules_to_save", value, "list") for value in ("head", [1], 3)],
    *[("target_modules", value, "empty") for value in ([], ())],
    *[("target_modules", value, "") for value in ("", "(", "*q")],
    *[("exclude_modules", value, "") for value in ("", "[")],
    *[("rank_pattern", value, "") for value in ([("q", 1)], None, {"q": 0}, {"q": 1.5}, {"(": 1}, {"": 1}, {1: 1})],
    *[("alpha_pattern", value, "") for value in ({"q": 0}, {"q": "1"}, {"q": NAN}, {"(": 1})],
    *[("layers_to_transform", value, "layer index") for value in ("0", [0.5], [], -1, [-1], True, [True], {0})],
    *[("trainable_token_indices", value, "list of token ids") for value in ("3", [], [-1], [1.5], [True], [2**31], {"e": []})],
    *[("trainable_token_indices", value, "name modules") for value in ({}, {3: [1]}, {"": [1]})],
    ("trainable_token_indices", [4, 5, 4], "token 4 twice"),
    *[("layers_pattern", value, "") for value in ("layers", ["layers"], [], [3])],
]
