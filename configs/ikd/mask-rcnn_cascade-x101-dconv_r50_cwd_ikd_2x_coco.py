# Mask R-CNN: CWD and IKD; no published run. CWD's numbers are those published for Faster R-CNN: none is published for Mask R-CNN,
# and Table 1 does not say its own.
_base_ = "../_base_/ikd_mask_rcnn.py"
model = dict(losses=[dict(type="CWDLoss", preset="faster_rcnn")])
