import sys,time,tempfile
from pathlib import Path
from tests.validation.conftest import save_base, save_adapter
from lora_export.merging import merge
from lora_export.contracts import *
from lora_export.validation import validate
from lora_export.progress import Silent
import torch
torch.set_num_threads(1)
root=Path("/tmp/scope-tiny"); 
if not root.exists():
    root.mkdir(); save_base(root/"base",torch.bfloat16); save_adapter(root/"base",root/"adapter"); merge(root/"base",[AdapterChoice(root/"adapter")],root/"merged")
class P(Silent):
    def stage(self,t):
        now=time.time(); print(f"   {now-self.t:.2f}"); self.t=now; print(t,end=" ")
for _ in range(2):
    p=P(); p.t=t=time.time(); r=validate(root/"base",[AdapterChoice(root/"adapter")],root/"merged",options=ValidationOptions(provider="cpu"),progress=p); print(); print("TOTAL",time.time()-t, r.passed); print(r.checks[0].note)
