# Table 1, RepPoints: FGD. Paper: 42.0 COCO val box AP.
_base_ = "../_base_/ikd_reppoints.py"
model = dict(adv=None, augment=None, stop_at=None)
