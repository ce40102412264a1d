# Faster R-CNN: PKD and IKD; no published run. PKD's weight, levels and tap (the neck) are mmrazor's of this pair.
_base_ = "../_base_/ikd_faster_rcnn.py"
model = dict(losses=[dict(type="PKDLoss", preset="faster_rcnn")])
