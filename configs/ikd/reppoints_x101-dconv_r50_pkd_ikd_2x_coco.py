# RepPoints: PKD and IKD; no published run. PKD's weight, levels and tap (the neck) are mmrazor's of this pair; the student starts
# from its own neck and head, as there.
_base_ = "../_base_/ikd_reppoints.py"
model = dict(losses=[dict(type="PKDLoss", preset="reppoints")], init_student=False)
