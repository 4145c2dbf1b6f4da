"""Cases that once failed, for test_fuzz.py: (name in its CHECKS, case)."""

DENSE = {"layout": "dense", "dtype": "float32", "grad": True}
ADAM = {
    "lr": 0.1,
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "weight_decay": 0,
    "amsgrad": False,
    "foreach": None,
    "fused": None,
    "differentiable": False,
}

REGRESSIONS = [
    # Empty parameters alone: division by zero.
    (
        "adam",
        {
            "op": "Adam",
            "params": [([0], DENSE, DENSE)],
            "skipped": [],
            "options": ADAM,
            "steps": 2,
            "groups": 1,
        },
    ),
    # A double tensor, which is PyTorch's, and sizes that its arithmetic wraps around.
    *(
        (
            "conv2d",
            {
                "op": "conv2d",
                "x": ([1, 1, 5, 5], {**DENSE, "dtype": "float64"}),
                "w": ([1, 1, 3, 3], {**DENSE, "dtype": "float64"}),
                "b": None,
                "options": {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, name: value},
                "precision": "ieee",
            },
        )
        for name in ("stride", "padding", "dilation")
        for value in (2**31, 2**62)
    ),
    # A bias of another dtype, which PyTorch takes where padding is text.
    (
        "conv2d",
        {
            "op": "conv2d",
            "x": ([1, 1, 1, 1], DENSE),
            "w": ([1, 1, 1, 1], DENSE),
            "b": ([1], {**DENSE, "dtype": "float64"}),
            "options": {"stride": 1, "padding": "same", "dilation": 1, "groups": 1},
            "precision": "ieee",
        },
    ),
    # A dilation of 0, which PyTorch takes where there is no image.
    *(
        (
            "conv2d",
            {
                "op": op,
                "x": ([0, 1, 2, 2], DENSE),
                "w": ([1, 1, 1, 1], DENSE),
                "b": None,
                "options": {"stride": 1, "padding": 0, "dilation": 0, "groups": 1},
                "precision": "ieee",
            },
        )
        for op in ("conv2d", "conv2d_relu", "conv2d_relu_max_pool2d")
    ),
    # Windows of padding alone, which PyTorch takes where there is no image.
    (
        "max_pool2d",
        {
            "x": ([0, 1, 1, 1], {**DENSE, "dtype": "float64"}),
            "special": False,
            "args": {
                "kernel_size": 2,
                "stride": None,
                "padding": 1,
                "dilation": 2,
                "ceil_mode": False,
            },
        },
    ),
    # Two mistakes: PyTorch's is the first.
    (
        "cross_entropy",
        {
            "x": ([1], {**DENSE, "dtype": "int64"}),
            "target": ([1], "probabilities"),
            "range": (0, 1),
            "weight": None,
            "options": {"label_smoothing": 1.5},
        },
    ),
]
