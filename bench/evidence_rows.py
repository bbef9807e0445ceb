"""The rows of a study: what each changes of the method, and the flags of `fastcr.train` that do it."""

from __future__ import annotations

import itertools

# MoCo v2's objective, optimiser and views
MOCO_V2 = (
    "--moco.objective infonce --moco.head mlp --moco.temperature 0.2 --moco.key_momentum 0.999 --views.key same "
    "--views.jitter 1 --views.grey 0.2 --views.blur 0.5 --optim.optimizer sgd --optim.lr 0.03 --optim.epochs 100 "
    "--optim.batch_size 128 --model.frozen_stages 0"
)
MEAN_POOLED = "--rationale.init random --moco.pooling mean --rationale.fit_weight 1"
FROZEN = "frozen"  # the row whose scores are those of step 0
STOPPED = {"stopped": "fit gradient stopped at the features", "flowing": "fit gradient flows into the features"}
FLOWS = {"stopped": "--rationale.stop_gradient True", "flowing": "--rationale.stop_gradient False"}
KEEPS = {"score": "match", "loss": "mismatch"}  # in rows' names: what lowers the loss, what raises it
CHOICES = list(itertools.product(("max-softmax", "sum"), KEEPS, STOPPED))
OF_LOSS = "--rationale.cam_of loss --rationale.cam_weights own"
BASE = f"--rationale.target max-softmax --rationale.cam_keeps mismatch {OF_LOSS}"
# what GradCAM is of, which of its halves, and whose channel weights it has
CAMS = {
    f"{weights}-{name}": (
        f"{whose} channel weights, GradCAM of {what}",
        f"--rationale.target max-softmax --rationale.cam_weights {weights} --rationale.cam_of {flags}",
    )
    for weights, whose in (("own", "each image's own"), ("common", "the batch's common"))
    for name, what, flags in (
        ("loss", "the loss: positions that raise it", "loss --rationale.cam_keeps mismatch"),
        ("score", "the loss: positions that lower it", "loss --rationale.cam_keeps match"),
        ("logit", "the views' similarity: positions that lower it", "similarity --rationale.cam_keeps mismatch"),
        ("raised", "the views' similarity: positions that raise it", "similarity --rationale.cam_keeps match"),
    )
}
CARE = "--optim.backbone_warmup 3 --optim.backbone_lr 0.001 --moco.key_momentum 0.99"
KEPT = "--optim.backbone_lr 0 --model.batchnorm frozen --moco.key_momentum 0.99"
COMMON_LOGIT = CAMS["common-logit"][1]
# name: (meaning, flags of fastcr.train); a first flag without dashes is the preset, else it is `folder`
LINES = {
    FROZEN: ("the initial weights, random detectors", "--run.steps 1"),
    "moco": ("MoCo v2 without the branch", "--rationale.enabled False"),
    "released": ("the variant of the authors' released code", "cub200-released"),
    **{
        f"uniform-{way}": (f"exactly uniform target, {meaning}", f"--rationale.target uniform {FLOWS[way]}")
        for way, meaning in STOPPED.items()
    },
    **{
        f"{target}-{sign}-{way}": (
            f"target {target}, GradCAM of the {sign}, {STOPPED[way]}",
            f"--rationale.target {target} --rationale.cam_keeps {KEEPS[sign]} {FLOWS[way]} {OF_LOSS}",
        )
        for target, sign, way in CHOICES
    },
    # max-softmax-loss-stopped with something else
    "branch-lr0.1": ("learning rate 0.1 of the branch", f"{BASE} --rationale.lr 0.1"),
    "backbone-lr0.001": ("learning rate 0.001 of the backbone", f"{BASE} --optim.backbone_lr 0.001"),
    "key-momentum0.99": ("keys that follow faster", f"{BASE} --moco.key_momentum 0.99"),
    **{
        f"flowing-lambda{weight}": (
            f"weight {weight} of the fit, flowing",
            f"{BASE} {FLOWS['flowing']} --rationale.fit_weight {weight}",
        )
        for weight in ("0.01", "0.1", "10")
    },
    **{
        f"{name}-plain": (f"{meaning}; the learning rates and keys of the rows above", flags)
        for name, (meaning, flags) in CAMS.items()
        if name.endswith(("logit", "raised"))
    },
    **{
        name: (f"{meaning}; backbone held three epochs, then at rate 0.001; faster keys", f"{CARE} {flags}")
        for name, (meaning, flags) in CAMS.items()
    },
    **{
        f"kept-{name}": (f"{meaning}; the backbone stays as it was; faster keys", f"{KEPT} {flags}")
        for name, (meaning, flags) in CAMS.items()
    },
    # common-logit with something else
    **{
        f"common-logit-{name}": (f"common-logit, {meaning}", f"{CARE} {COMMON_LOGIT} {flags}")
        for name, meaning, flags in (
            ("not-held", "the backbone never held", "--optim.backbone_warmup 0"),
            ("fast", "the backbone at rate 0.01 once it learns", "--optim.backbone_lr 0.01"),
            ("slow-keys", "keys of momentum 0.999", "--moco.key_momentum 0.999"),
            *(
                (f"lambda{weight}", f"flowing, weight {weight}", f"{FLOWS['flowing']} --rationale.fit_weight {weight}")
                for weight in ("0.1", "1", "10")
            ),
        )
    },
    # kept-common-logit with something else
    **{
        f"kept-{name}": (f"kept-common-logit, {meaning}", f"{KEPT} {COMMON_LOGIT} {flags}")
        for name, meaning, flags in (
            ("sum", "target sum", "--rationale.target sum"),
            *((f"k{k}", f"{k} detectors", f"--rationale.detectors {k}") for k in (1, 8, 16, 64, 128)),
            *((f"tau{tau}", f"temperature {tau}", f"--rationale.temperature {tau}") for tau in ("0.1", "0.2", "1.0")),
            *((f"queue{n}", f"a queue of {n} keys", f"--moco.queue_size {n}") for n in (256, 4096, 65536)),
            ("queue0", "no queue: the negatives are the batch's other keys", "--moco.queue_size 0"),
            ("branch-lr0.1", "learning rate 0.1 of the branch", "--rationale.lr 0.1"),
        )
    },
}
# the second edition: `attended` is the preset `folder`; the others, but for `untrained`, pool with the mean in training
SECOND = {
    "untrained": ("the initial weights, detectors that begin near DDT", "--optim.epochs 0 --rationale.init ddt"),
    "relational": ("the preset, but for mean pooling and a branch that is fitted to GradCAM from a random start", ""),
    "neighbour": (
        "the five nearest keys of the queue are the positives",
        "--moco.objective neighbour --moco.neighbours 5",
    ),
    "infonce": ("the own key is the positive, the queue's are negatives", "--moco.objective infonce"),
    "byol": ("predict the own key, no queue", "--moco.objective byol"),
    "moco-v2": ("MoCo v2's objective, optimiser and views, BatchNorm frozen", f"{MOCO_V2} --optim.epochs 12"),
    "moco-v2-batchnorm": (
        "the same, BatchNorm with the batch's statistics",
        f"{MOCO_V2} --optim.epochs 12 --model.batchnorm local",
    ),
    **{
        f"relational-{name}": (f"relational, {meaning}", flags)
        for name, meaning, flags in (
            ("weak-key", "the key sees a random weak crop", "--views.key weak"),
            ("fast-key", "key momentum 0.99", "--moco.key_momentum 0.99"),
            ("fixed-key", "the key encoder stays as it was", "--moco.key_momentum 1"),
            ("moco-views", "MoCo v2's views for the query", "--views.jitter 1 --views.grey 0.2 --views.blur 0.5"),
            ("small-head", "queries and keys of 256 dimensions", "--moco.embedding_dim 256"),
            ("saved-key", "the key encoder is measured", "--moco.saved key"),
            ("all-stages", "no stage is kept", "--model.frozen_stages 0"),
            ("half", "six epochs", "--optim.epochs 6"),
            ("double", "24 epochs", "--optim.epochs 24"),
            ("ddt", "detectors that begin near DDT", "--rationale.init ddt"),
            ("match", "GradCAM keeps what makes the views similar", "--rationale.cam_keeps match"),
            ("own", "each image's own channel weights", "--rationale.cam_weights own"),
            ("flowing", "the fit changes the features too", "--rationale.stop_gradient False"),
            *((f"k{k}", f"{k} detectors", f"--rationale.detectors {k}") for k in (8, 128)),
        )
    },
}
SECOND = {
    name: (meaning, flags if name == "untrained" else f"{MEAN_POOLED} {flags}".strip())
    for name, (meaning, flags) in SECOND.items()
}
ATTENDED = "--rationale.init ddt --moco.pooling rationale"
SECOND |= {
    "attended": (
        "pooled with DDT's attention in training too, which stays as it was",
        f"{ATTENDED} --rationale.fit_weight 0",
    ),
    "attended-fit": ("the same, the attention fitted to GradCAM from there", f"{ATTENDED} --rationale.fit_weight 1"),
    "attended-match": (
        "the same, fitted to GradCAM of what makes the views similar",
        f"{ATTENDED} --rationale.fit_weight 1 --rationale.cam_keeps match",
    ),
}
LINES |= {name: (meaning, f"folder {flags}") for name, (meaning, flags) in SECOND.items()}
LINES["released-code"] = ("the variant of the authors' released code", "cub200-released --optim.epochs 12")
ROWS = {name: (meaning, tuple(flags.split())) for name, (meaning, flags) in LINES.items()}
