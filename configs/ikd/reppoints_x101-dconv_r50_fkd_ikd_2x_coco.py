# RepPoints: FKD and IKD; no published run. FKD's numbers are the authors' for one-stage detectors; Table 1 does not say its own.
_base_ = "../_base_/ikd_reppoints.py"
model = dict(
    losses=[dict(type="FKDLoss", preset="reppoints", source="neck.fpn_convs.{i}.conv")],
    init_student=False,
)
