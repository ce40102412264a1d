# Faster R-CNN: CWD and IKD; no published run. CWD's numbers, levels and tap (all 5 maps of the neck) are mmrazor's of this pair.
_base_ = "../_base_/ikd_faster_rcnn.py"
model = dict(losses=[dict(type="CWDLoss", preset="faster_rcnn")])
