# RetinaNet: two losses of different kinds and IKD; no published run. FGD on the FPN, CWD on the class head's logits (9 anchors x 80
# classes a level) with the numbers published for GFL's.
_base_ = "../_base_/ikd_retinanet.py"
model = dict(
    losses=[
        dict(type="FGDLoss", preset="retinanet", source="neck.fpn_convs.{i}.conv"),
        dict(type="CWDLoss", preset="gfl", source="bbox_head.retina_cls"),
    ]
)
