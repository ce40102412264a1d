# GFL: CWD on the class head's logits, and IKD; no published run. A head's convolution is called once a level, so its tap is the
# pyramid of the 5 levels, 80 channels each. CWD's numbers are mmrazor's of this pair.
_base_ = "../_base_/ikd_gfl.py"
model = dict(losses=[dict(type="CWDLoss", preset="gfl", source="bbox_head.gfl_cls")])
