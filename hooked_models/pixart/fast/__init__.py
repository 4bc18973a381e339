"""Speed apart from the maths.

Wrappers around the model, each removable, with the same numbers. Keys and values of a prompt are
computed once for all steps by the model itself: `HookedDiT.encode_text`, `text_state`.

`empty_prompts`    cross-attention of empty prompts, computed once instead of at every position
`enter_at_layers`  one denoiser call whose rows begin at different layers
"""
