# RetinaNet: PKD and IKD; no published run. PKD's weight, levels and tap (the neck) are mmrazor's of this pair; the student starts
# from its own neck and head, as there.
_base_ = "../_base_/ikd_retinanet.py"
model = dict(losses=[dict(type="PKDLoss", preset="retinanet")], init_student=False)
