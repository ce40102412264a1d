# Faster R-CNN: structural KD and IKD; no published run. Weight 4, of which the paper says that it or 2 is best; all maps of the
# neck.
_base_ = "../_base_/ikd_faster_rcnn.py"
model = dict(losses=[dict(type="SSIMLoss", preset="faster_rcnn")])
