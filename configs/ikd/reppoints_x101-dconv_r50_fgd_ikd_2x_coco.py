# Table 1, RepPoints: ours (+FGD). Paper: 43.0 COCO val box AP.
_base_ = "../_base_/ikd_reppoints.py"
